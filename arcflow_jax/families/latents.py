"""Latent images and the tokens of a transformer: one token is a 2×2 patch of the latent image."""

# B batch, h, w latent height and width, C latent channels, N tokens = rows · columns of patches

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arcflow_jax.errors import UserError

PATCH = 2


def token_side(factor: int) -> int:
    """The side of a token in pixels, with a VAE of that factor."""
    return PATCH * factor


def token_grid(height: int, width: int, factor: int) -> tuple[int, int]:
    """Rows and columns of tokens of an image of height × width pixels.

    Args:
      height, width: in pixels.
      factor: of the VAE, pixels per latent pixel and axis.

    Raises:
      UserError: if a side is not a positive multiple of a token's side, factor · 2 pixels.
    """
    side = token_side(factor)
    if height < side or width < side or height % side or width % side:
        raise UserError(f"image size {height}x{width}: height and width have to be positive multiples of {side}")
    return height // side, width // side


def pack(latents: jax.Array) -> jax.Array:  # [B, h, w, C] -> [B, N, 4C]
    """Tokens of a latent image, row by row, with feature c·4 + dy·2 + dx (diffusers' FluxPipeline._pack_latents)."""
    batch, height, width, channels = latents.shape
    x = latents.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4)  # [B, row, column, C, dy, dx]
    return x.reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens: jax.Array, rows: int, columns: int) -> jax.Array:  # [B, N, 4C] -> [B, h, w, C]
    """The latent image of rows · columns tokens, the inverse of `pack`."""
    batch, _, features = tokens.shape
    x = tokens.reshape(batch, rows, columns, features // PATCH**2, PATCH, PATCH)
    x = x.transpose(0, 1, 4, 2, 5, 3)  # [B, row, dy, column, dx, C]
    return x.reshape(batch, rows * PATCH, columns * PATCH, -1)


def as_tokens(latents: Any, count: int, rows: int, columns: int, features: int) -> jax.Array:  # [B, N, 4C] float32
    """A user's latents as tokens.

    Args:
      latents: packed [B, N, 4C] or, as a latent image in PyTorch, [B, C, h, w].
      count: B, the number of images.
      rows, columns: of tokens; N = rows · columns, h = 2 · rows, w = 2 · columns.
      features: 4C.

    Raises:
      UserError: if the array has another shape, or is not of finite floating-point numbers.
    """
    packed = (count, rows * columns, features)
    image = (count, features // PATCH**2, rows * PATCH, columns * PATCH)
    shape = tuple(latents.shape)
    if shape not in (packed, image):
        raise UserError(f"latents are {list(shape)}, {count} images of this size need {list(packed)} or {list(image)}")
    if not jnp.issubdtype(latents.dtype, jnp.floating):
        raise UserError(f"latents are of {latents.dtype}, but have to be floating-point numbers")
    tokens = jnp.asarray(latents, jnp.float32)
    tokens = pack(tokens.transpose(0, 2, 3, 1)) if shape == image else tokens
    if not jnp.isfinite(tokens).all():
        raise UserError("latents hold values that are not finite")
    return tokens


def position_ids(rows: int, columns: int) -> jax.Array:  # [N, 3]
    """(0, row, column) of every token in the order of `pack`: FLUX.1's positions for the rotary embedding."""
    return jax.device_put(_positions(rows, columns))


def centred_positions(rows: int, columns: int) -> jax.Array:  # [N, 3]
    """(0, row, column) of every token in the order of `pack`, relative to the center: Qwen-Image's (`scale_rope`).

    Of an odd number of tokens, one more lies before the center than from there on.
    """
    center = np.array([0, rows - rows // 2, columns - columns // 2], np.float32)
    return jax.device_put(_positions(rows, columns) - center)


def _positions(rows: int, columns: int) -> np.ndarray:
    # In NumPy: each operation of jax.numpy is a program, which every process would compile or load
    return np.indices((1, rows, columns), np.float32).reshape(3, -1).T
