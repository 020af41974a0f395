"""The Legendre series: a velocity on one segment in a well-conditioned basis.

One network evaluation at σ_src predicts K coefficients c for each latent pixel and channel. With the position in the
segment u = (σ_src − σ) / (σ_src − σ_end), from 0 to 1, and the Legendre polynomials P_j,

    v(σ) = Σ_j c_j · P_j(2u − 1)

The polynomials are orthogonal on the segment, whereas the exponentials of a momentum mixture are nearly collinear. So
an error in one coefficient cannot hide behind another. c_0 alone is the segment's displacement divided by its length.

This basis is not from the paper. K = 1 is the linear student, a constant velocity.
"""

# B batch, N tokens, K coefficients, C latent channels, 4 pixels of a token's 2×2 patch, Q quadrature nodes

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from arcflow_jax.flow.curve import Curve, Span, per_example


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Series(Curve):
    """The prediction of one student evaluation.

    Attributes:
      coefficients: c, in latent units per unit of σ.
    """

    coefficients: jax.Array  # [B, N, K, C, 4]

    @property
    def modes(self) -> int:
        return self.coefficients.shape[2]

    def velocity(self, span: Span, sigma: jax.Array) -> jax.Array:  # [B, N, 4C]
        return self._sum(polynomials(self._argument(span, sigma), self.modes))

    def mean_velocity(self, span: Span, sigma_a: jax.Array, sigma_b: jax.Array) -> jax.Array:  # [B, N, 4C]
        """See `Curve`. Gaussian quadrature with ⌈K/2⌉ nodes, which is exact for polynomials of degree K − 1.

        Dividing the difference of the antiderivatives by the length would give 0/0 on an empty span.
        """
        nodes, weights = np.polynomial.legendre.leggauss((self.modes + 1) // 2)
        a, b = self._argument(span, sigma_a), self._argument(span, sigma_b)
        s = (a + b) / 2 + (b - a) / 2 * nodes  # [B, 1, Q]
        values = polynomials(s[..., None], self.modes)  # [B, 1, Q, K]
        return self._sum((values * (weights / 2)[:, None]).sum(2))

    def _argument(self, span: Span, sigma: jax.Array) -> jax.Array:  # [B, 1, 1], or [1, 1, 1] for the whole batch
        """The argument of the polynomials, 2u − 1."""
        dtype = jnp.promote_types(self.coefficients.dtype, jnp.float32)
        src, end, sigma = per_example(dtype, 3, *span, sigma)
        return 2 * (src - sigma) / (src - end) - 1

    def _sum(self, values: jax.Array) -> jax.Array:  # [B, 1, K] -> [B, N, 4C]
        """Σ_j c_j · values_j. A product and a sum, for the reasons given in `Mixture._sum_modes`."""
        total = (values[..., None, None] * self.coefficients.astype(values.dtype)).sum(2)  # [B, N, C, 4]
        return total.reshape(*total.shape[:2], -1)


def polynomials(s: jax.Array, count: int) -> jax.Array:  # [.., 1] -> [.., count]
    """P_0 … P_{count − 1} at s, by Bonnet's recursion (j + 1)·P_{j+1} = (2j + 1)·s·P_j − j·P_{j−1}."""
    values = [jnp.ones_like(s), s]
    for j in range(1, count - 1):
        values.append(((2 * j + 1) * s * values[j] - j * values[j - 1]) / (j + 1))
    return jnp.concatenate(values[:count], axis=-1)
