"""From noise to latents: the student in a few exact steps, the teacher in Euler steps.

Only the number of steps is static. Both loops are scans over σ, so a compiled sampler holds one copy of the network
for any number of steps.
"""

# B batch, N tokens, D features of a token

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from arcflow_jax.flow.curve import Curve, Span
from arcflow_jax.flow.schedule import boundaries, euler_grid, sigma_of


def sample(
    student: Callable[[jax.Array, jax.Array], Curve],
    latents: jax.Array,
    *,
    steps: int,
    shift: jax.Array | float,
    final_step_ratio: jax.Array | float,
) -> jax.Array:  # [B, N, D] -> [B, N, D]
    """Samples with the student.

    Args:
      student: student(x [B, N, D], σ [B]) → the curve of the segment that starts at σ.
      latents: noise, [B, N, D].
      steps: the number of network evaluations (NFE), one per segment. Static.
      shift: the timestep shift; see `schedule.sigma_of`.
      final_step_ratio: length of the last segment relative to the others; see `schedule.boundaries`.

    Returns:
      The denoised latents, float32. Each segment is integrated in closed form.
    """

    def segment(x: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
        curve = student(x, jnp.full(x.shape[0], sigma))
        displacement = curve.displacement(Span(sigma, sigma_next), sigma, sigma_next)
        chex.assert_equal_shape([x, displacement])
        return x - displacement

    return _follow(segment, latents, sigma_of(boundaries(steps, final_step_ratio), shift))


def euler(
    teacher: Callable[[jax.Array, jax.Array], jax.Array],
    latents: jax.Array,
    *,
    steps: int,
    shift: jax.Array | float,
    terminal: jax.Array | float | None = None,
) -> jax.Array:  # [B, N, D] -> [B, N, D]
    """Samples with the teacher, in Euler steps.

    Args:
      teacher: teacher(x [B, N, D], σ [B]) → the velocity dx/dσ, [B, N, D].
      latents: noise, [B, N, D].
      steps: the number of Euler steps. Static.
      shift, terminal: see `schedule.euler_grid`.

    Returns:
      The denoised latents, float32.
    """

    def step(x: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
        velocity = teacher(x, jnp.full(x.shape[0], sigma))
        chex.assert_equal_shape([x, velocity])
        return x + velocity.astype(x.dtype) * (sigma_next - sigma)

    return _follow(step, latents, euler_grid(steps, shift, terminal))


def _follow(
    move: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], latents: jax.Array, sigmas: jax.Array
) -> jax.Array:
    """Moves the latents from each noise level in `sigmas` to the next, by move(x, σ, next σ)."""
    chex.assert_rank(latents, 3)
    x = latents.astype(jnp.promote_types(latents.dtype, jnp.float32))
    sigmas = sigmas.astype(x.dtype)
    x, _ = jax.lax.scan(lambda x, pair: (move(x, *pair), None), x, (sigmas[:-1], sigmas[1:]))
    return x
