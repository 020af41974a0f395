"""The common part of the VAEs: an encoder to mean and log-variance, a decoder, and how it decodes in tiles.

A tile is a strip of rows, as wide as the image. One layer or a few are computed strip by strip, each with as many rows
around it as their convolutions reach, and then the next ones. So the image is that of the whole decode, up to rounding:
there is no seam to blend. The middle of the decoder, with its attention, is small and is computed whole.

Tiles that pass the whole decoder alone would need less memory still, but they are other images: each has statistics of
its own in every group norm. On the bundled FLUX.1 VAE and a smooth image of 512 × 512, four tiles without overlap were
off by 25 grey levels on average. Statistics from the latents at half their size were off by up to 10, on images with
texture by up to 73.
"""

# B batch, H, W image size, C latent channels, f the downsampling factor

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx


class VAE(nnx.Module, abc.ABC):
    """A VAE; `config.factor` is f, the number of pixels per latent pixel along one side.

    `ENCODER` names the modules that `encoder_alone` leaves.
    """

    ENCODER: ClassVar[tuple[str, ...]] = ("encoder",)

    def __init__(self, config: Any, encoder: nnx.Module, decoder: nnx.Module):
        self.config = config
        self.encoder: nnx.Module | None = nnx.data(encoder)
        self.decoder: nnx.Module | None = nnx.data(decoder)

    def decoder_alone(self) -> Self:
        """This VAE without its encoder: a third of the weights, which sampling does not need."""
        self.encoder = None
        return self

    def encoder_alone(self) -> Self:
        """This VAE without what encoding does not need."""
        self.decoder = None
        return self

    def posterior(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance, each [B, H/f, W/f, C], not normalised.

        Raises:
          ValueError: if H or W is not divisible by f.
        """
        height, width = pixels.shape[1:3]
        if height % self.config.factor or width % self.config.factor:
            raise ValueError(f"image size {height}×{width} is not divisible by {self.config.factor}")
        mean, log_variance = jnp.split(self.encoder(pixels), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """The normalised posterior mean, [B, H/f, W/f, C]."""
        mean, _ = self.posterior(pixels)
        return self.normalise(mean)

    @abc.abstractmethod
    def normalise(self, mean: jax.Array) -> jax.Array:
        """Latents [B, H/f, W/f, C] as the transformer sees them."""

    @abc.abstractmethod
    def decode(self, latents: jax.Array, tiled: bool = False) -> jax.Array:
        """Pixels [B, H, W, 3] of normalised latents; `tiled` needs less memory for the same image."""


STRIP = 2**17  # pixels of a strip: with FLUX.1's 256 channels in float32, 128 MiB


def strips(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, halo: int, scale: int = 1
) -> tuple[int, Callable[[jax.Array], tuple[jax.Array, jax.Array]]]:
    """How to compute function(x) in strips: their number, and what computes strip i.

    Args:
      function: convolutions, padded with zeros, and functions of single pixels: [B, H, W, C] -> [B, sH, sW, C'].
      x: an image [B, H, W, C].
      halo: how many rows of x around a pixel its value depends on.
      scale: s.
    """
    height, width = x.shape[1:3]
    most = max(1, STRIP // (width * scale**2))
    rows = next(rows for rows in range(min(height, most), 0, -1) if height % rows == 0)
    size = min(height, rows + 2 * halo)

    def compute(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        # At the edges of the image the strip lies inside it, so that the padding is that of the whole image
        start = jnp.clip(i * rows - halo, 0, height - size)
        y = function(jax.lax.dynamic_slice_in_dim(x, start, size, 1))
        return jax.lax.dynamic_slice_in_dim(y, (i * rows - start) * scale, rows * scale, 1), i * rows * scale

    return height // rows, compute


def in_strips(function: Callable[[jax.Array], jax.Array], x: jax.Array, halo: int, scale: int = 1) -> jax.Array:
    """function(x), [B, sH, sW, C'], computed in strips; arguments as for `strips`."""
    count, compute = strips(function, x, halo, scale)
    whole = jax.eval_shape(function, x)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        y, row = compute(i)
        return jax.lax.dynamic_update_slice_in_dim(out, y, row, 1)

    # All of it is overwritten. A value of x has XLA allocate it after x, when what x was computed from is gone
    return jax.lax.fori_loop(0, count, step, jnp.broadcast_to(x[0, 0, 0, 0].astype(whole.dtype), whole.shape))


def moments(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, halo: int, scale: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance over the pixels of function(x), each [B, C'] float32; arguments as for `strips`."""
    count, compute = strips(function, x, halo, scale)

    def of_strip(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = compute(i)[0].astype(jnp.float32)
        return y.mean((1, 2)), y.var((1, 2))

    means, variances = jax.lax.map(of_strip, jnp.arange(count))
    return means.mean(0), variances.mean(0) + means.var(0)


def upsampled(x: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B, 2H, 2W, C]
    """Each pixel four times."""
    return x.repeat(2, axis=1).repeat(2, axis=2)
