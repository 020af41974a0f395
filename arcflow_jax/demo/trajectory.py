"""The states that teacher and student pass through, from noise to data, and what they look like."""

# B batch, N tokens, D features of a token, P noise levels

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arcflow_jax.demo.evaluate import BATCH, SEED, with_cfg
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
    sigmas = euler_grid(steps, *teacher_grid(teacher.directory, noise.shape[1], steps))
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


@dataclasses.dataclass(frozen=True)
class Film:
    """Teacher and student on the same prompts and noises, at the same noise levels from 1 down to 0."""

    sigmas: np.ndarray  # [P]
    teacher: np.ndarray  # [P, B, H, W, 3] uint8: its states, decoded
    student: np.ndarray  # [P, B, H, W, 3] uint8
    distance: np.ndarray  # [P, B]: mean square distance of the two states


def film(
    teacher: ArcFlowPipeline,
    student: ArcFlowPipeline,
    prompts: Sequence[str],
    guidance: float,
    negative_prompt: str | None,
    steps: int,
    levels: int = 13,
) -> Film:
    """The first batch of the demo's prompts: the teacher in `steps` Euler steps, the student in two.

    Of the teacher's noise levels, those are shown that are nearest to `levels` evenly spaced ones.
    """
    prompts = prompts[:BATCH]
    rows, columns = teacher.grid()
    noise = teacher.noise(SEED, len(prompts), rows, columns)
    conditioning = teacher.encode(prompts, guidance=guidance, rows=rows, columns=columns)
    guided = with_cfg(teacher, conditioning, len(prompts), guidance, negative_prompt)
    sigmas, dense = teacher_states(teacher, noise, guided, steps)
    even = jnp.linspace(1.0, 0.0, levels)
    shown = np.unique(np.abs(np.subtract.outer(np.asarray(even), np.asarray(sigmas))).argmin(1))
    sigmas, dense = sigmas[shown], dense[shown]
    curve = student_states(student, noise, conditioning, 2, sigmas)
    images = (np.stack([teacher.decode(x, rows, columns) for x in states]) for states in (dense, curve))
    return Film(np.asarray(sigmas), *images, np.asarray(jnp.square(curve - dense).mean((2, 3))))


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
