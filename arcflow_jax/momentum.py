"""The momentum mixture: a basis for the velocity on one segment, integrable in closed form (arXiv 2602.09014).

One network call at σ_src predicts, for each latent pixel, K modes: mean velocities m, logits, and log-momenta g,
of which the first mode has none (g = 0: a constant velocity). With π = softmax(logits),

    v(σ) = Σ_k π_k · m_k · exp(g_k · (σ_src − σ))

A basis has three faces, and they live together here: the velocity, its exact integral, and what a network's
head has to predict, with the values it starts from. K = 1 is the linear student, a constant velocity.

Arithmetic is float32 whatever the network's dtype (float64 for a float64 mixture).
"""

# B batch, N tokens, K modes, C latent channels, 4 the pixels of a token's 2×2 patch

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

PIXELS = 4
INITIAL_MOMENTA = (0.2, 4.0)  # the range that the K − 1 momenta start in, evenly in their logarithm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """What one call of the student predicts: the velocity of every latent pixel on a whole segment.

    Logits and log-momenta are per pixel, shared by the channels.

    Attributes:
      means: mean velocities, latent units per unit of σ.
      logits: softmax over K gives the modes' weights.
      log_momenta: g, per unit of σ; used as it is, exp(g · Δσ).
    """

    means: jax.Array  # [B, N, K, C, 4]
    logits: jax.Array  # [B, N, K, 4]
    log_momenta: jax.Array  # [B, N, K - 1, 4]


class HeadSizes(NamedTuple):
    """The widths of the three linear heads that predict a mixture; each is mode-major, pixels last."""

    means: int
    logits: int
    log_momenta: int


def head_sizes(modes: int, channels: int) -> HeadSizes:
    """The widths for K modes of C latent channels."""
    return HeadSizes(modes * channels * PIXELS, modes * PIXELS, (modes - 1) * PIXELS)


def initial_log_momenta(modes: int) -> jax.Array:  # [K - 1]
    """The values that g starts from, at every pixel: log of K − 1 values log-spaced in `INITIAL_MOMENTA`."""
    low, high = INITIAL_MOMENTA
    return jnp.linspace(jnp.log(low), jnp.log(high), modes - 1)


def phi(z: jax.Array) -> jax.Array:
    """φ(z) = (e^z − 1) / z, φ(0) = 1, right to rounding in value and in gradient at every z.

    The quotient is 0/0 at 0, and its gradient loses digits like 1/z near it; there the Taylor series is summed.
    Each branch sees an argument that is safe for it, because NaN · 0 in a backward pass is NaN.
    """
    small = jnp.abs(z) < 0.5
    near = jnp.where(small, z, 0.0)
    far = jnp.where(small, 1.0, z)
    series = jnp.ones_like(z)
    for n in range(15, 1, -1):  # 0.5^14 / 15! is below float64's rounding, in the derivative too
        series = 1.0 + near * series / n
    return jnp.where(small, series, jnp.expm1(far) / far)


def velocity(mixture: Mixture, sigma_src: jax.Array, sigma: jax.Array) -> jax.Array:  # [B, N, 4C]
    """v(σ) of a mixture predicted at σ_src. Noise levels are [B], or scalars for the whole batch."""
    sigma_src, sigma = _per_example(mixture, sigma_src, sigma)
    return _sum_modes(mixture, jnp.exp(_exponents(mixture) * (sigma_src - sigma)))


def mean_velocity(
    mixture: Mixture, sigma_src: jax.Array, sigma_a: jax.Array, sigma_b: jax.Array
) -> jax.Array:  # [B, N, 4C]
    """The mean of v over [σ_b, σ_a]; where the span is empty, v(σ_a). Noise levels are [B], or scalars.

    Σ_k π_k · m_k · exp(g_k · (σ_src − σ_a)) · φ(g_k · (σ_a − σ_b)): no division by the span, so none to guard.
    """
    sigma_src, sigma_a, sigma_b = _per_example(mixture, sigma_src, sigma_a, sigma_b)
    g = _exponents(mixture)
    return _sum_modes(mixture, jnp.exp(g * (sigma_src - sigma_a)) * phi(g * (sigma_a - sigma_b)))


def displacement(
    mixture: Mixture, sigma_src: jax.Array, sigma_a: jax.Array, sigma_b: jax.Array
) -> jax.Array:  # [B, N, 4C]
    """∫ v dσ from σ_b up to σ_a, exactly: x at σ_b is x at σ_a less this. Noise levels are [B], or scalars."""
    a, b = _per_example(mixture, sigma_a, sigma_b)
    return (a - b)[..., 0] * mean_velocity(mixture, sigma_src, sigma_a, sigma_b)


def drop_modes(uniforms: jax.Array, mixture: Mixture, rate: float) -> Mixture:
    """The mixture without the modes whose uniform draw, [B, K] in [0, 1), is below `rate`; π is over the others.

    An example that would lose all its modes keeps all.
    """
    dropped = uniforms < rate
    dropped = dropped & ~dropped.all(-1, keepdims=True)
    return dataclasses.replace(mixture, logits=jnp.where(dropped[:, None, :, None], -jnp.inf, mixture.logits))


def _per_example(mixture: Mixture, *sigmas: jax.Array) -> list[jax.Array]:
    """Noise levels in the dtype of the arithmetic, shaped to meet [B, N, K, 4]."""
    dtype = jnp.promote_types(mixture.means.dtype, jnp.float32)
    return [jnp.asarray(sigma, dtype).reshape(-1, 1, 1, 1) for sigma in sigmas]


def _exponents(mixture: Mixture) -> jax.Array:  # [B, N, K, 4]
    """g of all K modes, the first one's 0 included."""
    g = mixture.log_momenta.astype(jnp.promote_types(mixture.means.dtype, jnp.float32))
    return jnp.pad(g, ((0, 0), (0, 0), (1, 0), (0, 0)))


def _sum_modes(mixture: Mixture, growth: jax.Array) -> jax.Array:  # [B, N, K, 4] -> [B, N, 4C]
    """Σ_k π_k · m_k · growth_k.

    A product and a sum, not an einsum: XLA makes one loop of them that reads the means once, in their own dtype,
    and float32 stays float32 where a matrix unit would round it to bfloat16.
    """
    weights = jax.nn.softmax(mixture.logits.astype(growth.dtype), axis=2) * growth
    total = (weights[:, :, :, None] * mixture.means.astype(growth.dtype)).sum(2)  # [B, N, C, 4]
    return total.reshape(*total.shape[:2], -1)
