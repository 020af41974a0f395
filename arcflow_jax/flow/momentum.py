"""The momentum mixture: a basis for the velocity on one segment, integrable in closed form (arXiv 2602.09014).

One network call at σ_src predicts, for each latent pixel, K modes: mean velocities m, logits, and log-momenta g,
of which the first mode has none (g = 0: a constant velocity). With π = softmax(logits),

    v(σ) = Σ_k π_k · m_k · exp(g_k · (σ_src − σ))

K = 1 is the linear student, a constant velocity.
"""

# B batch, N tokens, K modes, C latent channels, 4 the pixels of a token's 2×2 patch

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from arcflow_jax.flow.curve import Curve, Span, per_example

PIXELS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture(Curve):
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

    @property
    def modes(self) -> int:
        return self.means.shape[2]

    def velocity(self, span: Span, sigma: jax.Array) -> jax.Array:  # [B, N, 4C]
        g, src, sigma = self._exponents(span.src, sigma)
        return self._sum_modes(jnp.exp(g * (src - sigma)))

    def mean_velocity(self, span: Span, sigma_a: jax.Array, sigma_b: jax.Array) -> jax.Array:  # [B, N, 4C]
        """See `Curve`. Σ_k π_k · m_k · exp(g_k · (σ_src − σ_a)) · φ(g_k · (σ_a − σ_b)).

        No division by the span, so none to guard.
        """
        g, src, a, b = self._exponents(span.src, sigma_a, sigma_b)
        return self._sum_modes(jnp.exp(g * (src - a)) * phi(g * (a - b)))

    def drop_modes(self, uniforms: jax.Array, rate: float) -> Mixture:
        """Itself without the modes whose uniform draw, [B, K] in [0, 1), is below `rate`; π is over the others.

        An example that would lose all its modes keeps all.
        """
        dropped = uniforms < rate
        dropped = dropped & ~dropped.all(-1, keepdims=True)
        return dataclasses.replace(self, logits=jnp.where(dropped[:, None, :, None], -jnp.inf, self.logits))

    def _exponents(self, *sigmas: jax.Array) -> tuple[jax.Array, ...]:  # [B, N, K, 4], and [B, 1, 1, 1] each
        """g of all K modes, the first one's 0 included, and noise levels shaped to meet it."""
        g = self.log_momenta.astype(jnp.promote_types(self.means.dtype, jnp.float32))
        return jnp.pad(g, ((0, 0), (0, 0), (1, 0), (0, 0))), *per_example(g.dtype, 4, *sigmas)

    def _sum_modes(self, growth: jax.Array) -> jax.Array:  # [B, N, K, 4] -> [B, N, 4C]
        """Σ_k π_k · m_k · growth_k.

        A product and a sum, not an einsum: XLA makes one loop of them that reads the means once, in their own dtype,
        and float32 stays float32 where a matrix unit would round it to bfloat16.
        """
        weights = jax.nn.softmax(self.logits.astype(growth.dtype), axis=2) * growth
        total = (weights[:, :, :, None] * self.means.astype(growth.dtype)).sum(2)  # [B, N, C, 4]
        return total.reshape(*total.shape[:2], -1)


class HeadSizes(NamedTuple):
    """The widths of the three linear heads that predict a mixture; each is mode-major, pixels last."""

    means: int
    logits: int
    log_momenta: int


def head_sizes(modes: int, channels: int) -> HeadSizes:
    """The widths for K modes of C latent channels."""
    return HeadSizes(modes * channels * PIXELS, modes * PIXELS, (modes - 1) * PIXELS)


def initial_log_momenta(modes: int, momenta: tuple[float, float]) -> jax.Array:  # [K - 1]
    """The values that g starts from, at every pixel: log of K − 1 values log-spaced from one momentum to the other."""
    low, high = momenta
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
