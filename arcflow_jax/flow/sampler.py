"""From noise to latents: the student in a few exact steps, the teacher in Euler steps.

Only the number of steps is static. Both are loops over σ, so a compiled sampler holds one copy of the network for any
number of steps.

Either can start below σ = 1, from an image with noise: in the segment or Euler step that contains that noise level, of
which it takes what is left. The noise level is not compiled in.
"""

# B batch, N tokens, D features of a token

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from arcflow_jax.flow.curve import Curve, Span
from arcflow_jax.flow.schedule import boundaries, euler_grid, sigma_of


class Known(NamedTuple):
    """What of the latents is known and has to stay, for inpainting: a pytree.

    Attributes:
      clean: the known latents, [B, N, D].
      noise: that they are seen with at every noise level, [B, N, D].
      repaint: where latents are sampled, [B, N, D], bool; elsewhere they are known.
    """

    clean: jax.Array
    noise: jax.Array
    repaint: jax.Array

    def paste(self, x: jax.Array, sigma: jax.Array) -> jax.Array:  # [B, N, D] -> [B, N, D]
        """Latents at noise level σ with what is known pasted in."""
        return jnp.where(self.repaint, x, noised(self.clean, self.noise, sigma))


def noised(clean: jax.Array, noise: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """Latents with noise of level σ: (1 − σ)·clean + σ·noise."""
    return (1 - sigma) * clean + sigma * noise


def sample(
    student: Callable[[jax.Array, jax.Array], Curve],
    latents: jax.Array,
    *,
    steps: int,
    shift: jax.Array | float,
    final_step_ratio: jax.Array | float,
    start: jax.Array | float | None = None,
    known: Known | None = None,
) -> jax.Array:  # [B, N, D] -> [B, N, D]
    """Samples with the student.

    Args:
      student: student(x [B, N, D], σ [B]) → the curve of the segment that starts at σ.
      latents: [B, N, D], noise, or of noise level `start`.
      steps: the number of segments, of which each takes one network evaluation (NFE). Static.
      shift: the timestep shift; see `schedule.sigma_of`.
      final_step_ratio: length of the last segment relative to the others; see `schedule.boundaries`.
      start: noise level σ of `latents`, by default 1. The first segment is what is left below it of the one that it is
        in; segments above it are skipped.
      known: what is pasted at the end of each segment, see `Known`.

    Returns:
      The denoised latents, float32. Each segment is integrated in closed form.
    """

    def segment(x: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
        curve = student(x, jnp.full(x.shape[0], sigma))
        displacement = curve.displacement(Span(sigma, sigma_next), sigma, sigma_next)
        chex.assert_equal_shape([x, displacement])
        return x - displacement

    return _follow(segment, latents, sigma_of(boundaries(steps, final_step_ratio), shift), start, known)


def euler(
    teacher: Callable[[jax.Array, jax.Array], jax.Array],
    latents: jax.Array,
    *,
    steps: int,
    shift: jax.Array | float,
    terminal: jax.Array | float | None = None,
    start: jax.Array | float | None = None,
    known: Known | None = None,
) -> jax.Array:  # [B, N, D] -> [B, N, D]
    """Samples with the teacher, in Euler steps.

    Args:
      teacher: teacher(x [B, N, D], σ [B]) → the velocity dx/dσ, [B, N, D].
      latents: [B, N, D], noise, or of noise level `start`.
      steps: the number of Euler steps from σ = 1. Static.
      shift, terminal: see `schedule.euler_grid`.
      start, known: as for `sample`, with Euler steps in place of segments.

    Returns:
      The denoised latents, float32.
    """

    def step(x: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
        velocity = teacher(x, jnp.full(x.shape[0], sigma))
        chex.assert_equal_shape([x, velocity])
        return x + velocity.astype(x.dtype) * (sigma_next - sigma)

    return _follow(step, latents, euler_grid(steps, shift, terminal), start, known)


# Two noise levels that are closer are one. They are apart by rounding, and a network evaluation between them would be
# for nothing
SAME_LEVEL = 1e-5


def _follow(
    move: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    latents: jax.Array,
    sigmas: jax.Array,
    start: jax.Array | float | None,
    known: Known | None,
) -> jax.Array:
    """Moves the latents from each noise level in `sigmas` below `start` to the next, by move(x, σ, next σ)."""
    chex.assert_rank(latents, 3)
    x = latents.astype(jnp.promote_types(latents.dtype, jnp.float32))
    sigmas, steps = sigmas.astype(x.dtype), len(sigmas) - 1
    first: jax.Array | int = 0
    if start is not None:
        first = jnp.minimum((sigmas[1:] > start - SAME_LEVEL).sum(), steps - 1)
        sigmas = sigmas.at[first].set(start)

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        x = move(x, sigmas[i], sigmas[i + 1])
        return x if known is None else known.paste(x, sigmas[i + 1])

    return jax.lax.fori_loop(first, steps, step, x)
