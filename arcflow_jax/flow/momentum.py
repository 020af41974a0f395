"""The momentum mixture: a velocity on one segment that integrates in closed form (arXiv 2602.09014).

One network evaluation at σ_src predicts K modes for each latent pixel: mean velocities m, logits, and log-momenta g.
The first mode has no momentum (g = 0: a constant velocity). With π = softmax(logits),

    v(σ) = Σ_k π_k · m_k · exp(g_k · (σ_src − σ))

K = 1 is the linear student, a constant velocity.
"""

# B batch, N tokens, K modes, C latent channels, 4 pixels of a token's 2×2 patch

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
    """The prediction of one student evaluation: the velocity of every latent pixel on a whole segment.

    Logits and log-momenta are per pixel, shared by the channels.

    Attributes:
      means: mean velocities m, in latent units per unit of σ.
      logits: their softmax over K gives the weights π of the modes.
      log_momenta: g, per unit of σ; a mode grows by exp(g · Δσ).
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

        It does not divide by σ_a − σ_b, so an empty span needs no guard.
        """
        g, src, a, b = self._exponents(span.src, sigma_a, sigma_b)
        return self._sum_modes(jnp.exp(g * (src - a)) * phi(g * (a - b)))

    def drop_modes(self, uniforms: jax.Array, rate: float) -> Mixture:
        """This mixture without the modes whose draw in `uniforms`, [B, K] in [0, 1), is below `rate`.

        π is renormalized over the modes that are left. An example that would lose all its modes keeps them all.
        """
        dropped = uniforms < rate
        dropped = dropped & ~dropped.all(-1, keepdims=True)
        return dataclasses.replace(self, logits=jnp.where(dropped[:, None, :, None], -jnp.inf, self.logits))

    def _exponents(self, *sigmas: jax.Array) -> tuple[jax.Array, ...]:  # [B, N, K, 4], and [B, 1, 1, 1] each
        """g of all K modes, with the 0 of the first one, and noise levels reshaped to broadcast against it."""
        g = self.log_momenta.astype(jnp.promote_types(self.means.dtype, jnp.float32))
        return jnp.pad(g, ((0, 0), (0, 0), (1, 0), (0, 0))), *per_example(g.dtype, 4, *sigmas)

    def _sum_modes(self, growth: jax.Array) -> jax.Array:  # [B, N, K, 4] -> [B, N, 4C]
        """Σ_k π_k · m_k · growth_k.

        A product and a sum, not an einsum: XLA fuses them into one loop that reads the means once, in their own dtype.
        The arithmetic stays float32, where a matrix unit would round it to bfloat16.
        """
        weights = jax.nn.softmax(self.logits.astype(growth.dtype), axis=2) * growth
        total = (weights[:, :, :, None] * self.means.astype(growth.dtype)).sum(2)  # [B, N, C, 4]
        return total.reshape(*total.shape[:2], -1)


class HeadSizes(NamedTuple):
    """The output widths of the three linear layers that predict a mixture; each is mode-major, pixels last."""

    means: int
    logits: int
    log_momenta: int


def head_sizes(modes: int, channels: int) -> HeadSizes:
    """The widths for K modes of C latent channels."""
    return HeadSizes(modes * channels * PIXELS, modes * PIXELS, (modes - 1) * PIXELS)


def initial_log_momenta(modes: int, momenta: tuple[float, float]) -> jax.Array:  # [K - 1]
    """The initial g of every pixel: the logs of K − 1 momenta e^g, log-spaced between the two given ones."""
    low, high = momenta
    return jnp.linspace(jnp.log(low), jnp.log(high), modes - 1)


def phi(z: jax.Array) -> jax.Array:
    """φ(z) = (e^z − 1) / z, φ(0) = 1, with value and gradient exact to rounding at every z.

    The quotient is 0/0 at 0, and near 0 its gradient loses digits like 1/z. There the Taylor series is summed instead.
    Each branch gets an argument that is safe for it, because NaN · 0 in a backward pass is NaN.
    """
    small = jnp.abs(z) < 0.5
    near = jnp.where(small, z, 0.0)
    far = jnp.where(small, 1.0, z)
    series = jnp.ones_like(z)
    for n in range(15, 1, -1):  # 0.5^14 / 15! is below float64 rounding, also in the derivative
        series = 1.0 + near * series / n
    return jnp.where(small, series, jnp.expm1(far) / far)
