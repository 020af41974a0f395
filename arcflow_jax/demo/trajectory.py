"""The states that teacher and student pass through, from noise to data, for a figure."""

# B batch, N tokens, D features of a token, P noise levels

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax.flow.curve import Span
from arcflow_jax.flow.schedule import boundaries, euler_grid, sigma_of
from arcflow_jax.generate import teacher_grid
from arcflow_jax.pipeline import ArcFlowPipeline


def teacher_states(
    teacher: ArcFlowPipeline, noise: jax.Array, conditioning: Any, steps: int
) -> tuple[jax.Array, jax.Array]:
    """All states of the teacher's Euler steps from noise [B, N, D].

    Returns:
      The noise levels σ [steps + 1] from 1 down to 0, and the states at them, [steps + 1, B, N, D].
    """
    sigmas = euler_grid(steps, *teacher_grid(teacher.directory.scheduler, noise.shape[1]))
    with jax.set_mesh(teacher.mesh):
        run = functools.partial(_euler_states, teacher.graphdef)
        return sigmas, teacher.transformer.run(lambda state: run(state, noise, conditioning, sigmas))


def student_states(
    student: ArcFlowPipeline, noise: jax.Array, conditioning: Any, steps: int, sigmas: jax.Array
) -> jax.Array:  # [P, B, N, D]
    """The states of a student at given noise levels σ [P], from noise [B, N, D], with an NFE of `steps`.

    Each segment is one curve, which is known at every σ in closed form.

    Raises:
      ValueError: if the pipeline samples from a teacher.
    """
    if student.student is None:
        raise ValueError("the pipeline has no student: give from_pretrained an adapter")
    trained = student.student.distillation
    bounds = sigma_of(boundaries(steps, trained.final_step_ratio), trained.shift)
    with jax.set_mesh(student.mesh):
        run = functools.partial(_curve_states, student.graphdef)
        return student.transformer.run(lambda state: run(state, noise, conditioning, bounds, sigmas))


@functools.partial(jax.jit, static_argnums=0)
def _euler_states(
    graphdef: nnx.GraphDef, state: nnx.State, noise: jax.Array, conditioning: Any, sigmas: jax.Array
) -> jax.Array:
    model = nnx.merge(graphdef, state)

    def step(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sigma, sigma_next = pair
        x = x + model.teacher_velocity(x, jnp.full(len(x), sigma), conditioning) * (sigma_next - sigma)
        return x, x

    _, states = jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))
    return jnp.concatenate([noise[None], states])


@functools.partial(jax.jit, static_argnums=0)
def _curve_states(
    graphdef: nnx.GraphDef, state: nnx.State, noise: jax.Array, conditioning: Any, bounds: jax.Array, sigmas: jax.Array
) -> jax.Array:
    model = nnx.merge(graphdef, state)

    def segment(x: jax.Array, span: Span) -> tuple[jax.Array, jax.Array]:
        curve = model.student_curve(x, jnp.full(len(x), span.src), conditioning)

        def moved(sigma: jax.Array) -> jax.Array:  # nothing before the segment, all of its displacement after it
            return curve.displacement(span, span.src, jnp.clip(sigma, span.end, span.src))

        return x - moved(span.end), jax.lax.map(moved, sigmas)

    _, displacements = jax.lax.scan(segment, noise, Span(bounds[:-1], bounds[1:]))
    return noise - displacements.sum(0)
