"""From noise to latents: the student in a few calls, in closed form, and the teacher by Euler steps.

Only the number of steps is static. Either loop is a scan over σ, so that a compiled sampler holds one copy of the
network however many steps it takes.
"""

# B batch, N tokens, D features of a token

from __future__ import annotations

from collections.abc import Callable

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
    """The student's data for noise `latents`: `steps` calls student(x, σ [B]), each integrated exactly. float32."""

    def segment(x: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
        curve = student(x, jnp.full(x.shape[0], sigma))
        return x - curve.displacement(Span(sigma, sigma_next), sigma, sigma_next)

    return _follow(segment, latents, sigma_of(boundaries(steps, final_step_ratio), shift))


def euler(
    teacher: Callable[[jax.Array, jax.Array], jax.Array],
    latents: jax.Array,
    *,
    steps: int,
    shift: jax.Array | float,
    terminal: jax.Array | float | None = None,
) -> jax.Array:  # [B, N, D] -> [B, N, D]
    """The teacher's data for noise `latents`: `steps` Euler steps of the velocity teacher(x, σ [B]). float32.

    `shift` and `terminal` as for `schedule.euler_grid`.
    """

    def step(x: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
        return x + teacher(x, jnp.full(x.shape[0], sigma)).astype(x.dtype) * (sigma_next - sigma)

    return _follow(step, latents, euler_grid(steps, shift, terminal))


def _follow(
    move: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], latents: jax.Array, sigmas: jax.Array
) -> jax.Array:
    """Moves the latents from each noise level of `sigmas` to the next."""
    x = latents.astype(jnp.promote_types(latents.dtype, jnp.float32))
    sigmas = sigmas.astype(x.dtype)
    x, _ = jax.lax.scan(lambda x, pair: (move(x, *pair), None), x, (sigmas[:-1], sigmas[1:]))
    return x
