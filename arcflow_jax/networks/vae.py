"""What image autoencoders have in common: an encoder to mean and log-variance, and a decoder."""

# B batch, H, W image size, C latent channels, f the down-sampling factor

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx


class Autoencoder(nnx.Module):
    """Each kind brings networks, a config with `factor`, `normalise`, and `decode`."""

    def __init__(self, config: Any, encoder: nnx.Module, decoder: nnx.Module):
        self.config = config
        self.encoder: nnx.Module | None = nnx.data(encoder)
        self.decoder = decoder

    def decoder_alone(self) -> Self:
        """Itself without the encoder, a third of the weights, which making pictures does not need."""
        self.encoder = None
        return self

    def posterior(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance, each [B, H/f, W/f, C], not normalised. Raises ValueError on a wrong size."""
        height, width = pixels.shape[1:3]
        if height % self.config.factor or width % self.config.factor:
            raise ValueError(f"image size {height}×{width} is not divisible by {self.config.factor}")
        mean, log_variance = jnp.split(self.encoder(pixels), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """The normalised posterior mean, [B, H/f, W/f, C]."""
        mean, _ = self.posterior(pixels)
        return self.normalise(mean)
