"""The interface of a curve: a velocity on a whole segment, which integrates in closed form.

One student evaluation predicts the coefficients of a curve. There are two kinds: `momentum.Mixture`, the published
one, and `legendre.Series`. `networks.head` has the heads that predict them. Distillation and sampling use this
interface only.
"""

# B batch, N tokens, K modes, C latent channels, 4 pixels of a token's 2×2 patch

from __future__ import annotations

import abc
from typing import NamedTuple

import jax
import jax.numpy as jnp

from arcflow_jax.errors import UserError


class Span(NamedTuple):
    """A segment in σ, from `src`, where the network is evaluated, down to `end`. [B], or scalars."""

    src: jax.Array
    end: jax.Array


class Curve(abc.ABC):
    """A velocity on a segment, integrable in closed form. Noise levels σ are [B], or scalars for the whole batch.

    Arithmetic is float32 whatever the network's dtype (float64 for float64 coefficients).
    """

    @property
    @abc.abstractmethod
    def modes(self) -> int:
        """K, the number of coefficients per latent pixel and channel."""

    @abc.abstractmethod
    def velocity(self, span: Span, sigma: jax.Array) -> jax.Array:  # [B, N, 4C]
        """v(σ), latent units per unit of σ."""

    @abc.abstractmethod
    def mean_velocity(self, span: Span, sigma_a: jax.Array, sigma_b: jax.Array) -> jax.Array:  # [B, N, 4C]
        """The mean of v over [σ_b, σ_a]; v(σ_a) where that interval is empty."""

    def displacement(self, span: Span, sigma_a: jax.Array, sigma_b: jax.Array) -> jax.Array:  # [B, N, 4C]
        """∫ v dσ from σ_b up to σ_a, exact: x(σ_b) = x(σ_a) − displacement."""
        mean = self.mean_velocity(span, sigma_a, sigma_b)
        a, b = per_example(mean.dtype, 3, sigma_a, sigma_b)
        return (a - b) * mean

    def drop_modes(self, uniforms: jax.Array, rate: float) -> Curve:
        """This curve without some of its modes; see `momentum.Mixture`, the only kind that has modes to drop."""
        raise UserError(f"a {type(self).__name__} has no modes to drop: set mode_dropout to 0")


def per_example(dtype: jnp.dtype, ndim: int, *sigmas: jax.Array) -> list[jax.Array]:
    """Noise levels, [B] or scalars, reshaped to broadcast against arrays [B, ..] of `ndim` dimensions."""
    return [jnp.asarray(sigma, dtype).reshape(-1, *[1] * (ndim - 1)) for sigma in sigmas]
