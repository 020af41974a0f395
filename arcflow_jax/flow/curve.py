"""What stands between a network's prediction and a segment's trajectory: a curve in some basis.

One call of the student predicts the coefficients of a velocity on a whole segment. The bases are `momentum.Mixture`,
the published one, and `legendre.Series`; the heads that predict them stand in `models.head`. Distillation and sampling
know a curve by what is here.
"""

# B batch, N tokens, C latent channels, 4 the pixels of a token's 2×2 patch

from __future__ import annotations

import abc
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Span(NamedTuple):
    """A segment in σ, from where the network was called down to where it is called next. [B], or scalars."""

    src: jax.Array
    end: jax.Array


class Curve(abc.ABC):
    """A velocity on a segment, integrable in closed form. Noise levels are [B], or scalars for the whole batch.

    Arithmetic is float32 whatever the network's dtype (float64 for float64 coefficients).
    """

    @property
    @abc.abstractmethod
    def modes(self) -> int:
        """The number of coefficients a latent pixel and channel, K."""

    @abc.abstractmethod
    def velocity(self, span: Span, sigma: jax.Array) -> jax.Array:  # [B, N, 4C]
        """v(σ), latent units per unit of σ."""

    @abc.abstractmethod
    def mean_velocity(self, span: Span, sigma_a: jax.Array, sigma_b: jax.Array) -> jax.Array:  # [B, N, 4C]
        """The mean of v over [σ_b, σ_a]; where that is empty, v(σ_a)."""

    def displacement(self, span: Span, sigma_a: jax.Array, sigma_b: jax.Array) -> jax.Array:  # [B, N, 4C]
        """∫ v dσ from σ_b up to σ_a, exactly: x at σ_b is x at σ_a less this."""
        mean = self.mean_velocity(span, sigma_a, sigma_b)
        a, b = per_example(mean.dtype, 3, sigma_a, sigma_b)
        return (a - b) * mean


def per_example(dtype: jnp.dtype, ndim: int, *sigmas: jax.Array) -> list[jax.Array]:
    """Noise levels, [B] or scalars, shaped to meet arrays [B, ..] of `ndim` dimensions."""
    return [jnp.asarray(sigma, dtype).reshape(-1, *[1] * (ndim - 1)) for sigma in sigmas]
