"""The authors' reference values in tests/data/golden, brought into the layout of this library.

They come from the authors' own PyTorch code (ArcFlow, commit 4294909), as images [.., C, H, W] cut to the first
2×4 latent pixels (the inputs of case 05 are whole, because its loss is a mean over all pixels).
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from arcflow_jax.flow.momentum import Mixture

CLAMP = 1e-4  # the authors keep |g · Δσ| at least this large


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "data" / "golden" / f"{name}.npz") as arrays:
        return dict(arrays)


def pixels(image: np.ndarray) -> np.ndarray:  # [.., C, H, W] -> [.., N, C, 4]
    *lead, channels, height, width = image.shape
    patches = image.reshape(-1, channels, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    return patches.reshape(*lead, -1, channels, 4)


def tokens(image: np.ndarray) -> np.ndarray:  # [.., C, H, W] -> [.., N, 4C]
    x = pixels(image)
    return x.reshape(*x.shape[:-2], -1)


def mixture(means: np.ndarray, logits: np.ndarray, log_momenta: np.ndarray) -> Mixture:
    """From [B, K, C, H, W], [B, K, 1, H, W] and [B, K - 1, 1, H, W]; a mixture's gradient as well."""
    means, logits, log_momenta = (np.moveaxis(pixels(a), 1, 2) for a in (means, logits, log_momenta))
    return Mixture(jnp.asarray(means), jnp.asarray(logits[..., 0, :]), jnp.asarray(log_momenta[..., 0, :]))


def authors_phi(z: jax.Array) -> jax.Array:  # [.., K, 4]
    """φ as the authors have it: |z| no smaller than `CLAMP`, but in the first mode, which has no momentum."""
    clamped = jnp.where(z < 0, -1.0, 1.0) * jnp.maximum(jnp.abs(z), CLAMP)
    return (jnp.expm1(clamped) / clamped).at[..., 0, :].set(1.0)
