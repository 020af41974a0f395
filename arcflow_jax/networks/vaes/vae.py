"""The common part of the VAEs: an encoder to mean and log-variance, and a decoder."""

# B batch, H, W image size, C latent channels, f the downsampling factor

from __future__ import annotations

import abc
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx


class VAE(nnx.Module, abc.ABC):
    """A VAE; `config.factor` is f, the number of pixels per latent pixel along one side."""

    def __init__(self, config: Any, encoder: nnx.Module, decoder: nnx.Module):
        self.config = config
        self.encoder: nnx.Module | None = nnx.data(encoder)
        self.decoder = decoder

    def decoder_alone(self) -> Self:
        """This VAE without its encoder: a third of the weights, which sampling does not need."""
        self.encoder = None
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
    def decode(self, latents: jax.Array) -> jax.Array:
        """Pixels [B, H, W, 3] of normalised latents."""
