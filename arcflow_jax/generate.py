"""The jitted programs that make images: the student's sampler, the teacher's, the decoder, and what they start from.

Weights, latents, conditioning and scales are arguments, so that a program is compiled once for each shape and number of
steps, whatever the prompts.
"""

# B images, N tokens, C latent channels

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from arcflow_jax.errors import UserError, one_line, out_of_memory
from arcflow_jax.families.latents import unpack
from arcflow_jax.flow import sampler
from arcflow_jax.flow.schedule import scheduler_shift
from arcflow_jax.networks.conditioning import Conditioning, Guided
from arcflow_jax.networks.student import merged_state
from arcflow_jax.parallel.mesh import constrain, state_shardings

TEACHER_STEPS = 50  # by default


@functools.partial(jax.jit, static_argnames=("graphdef", "steps"))
def sample_student(
    graphdef: nnx.GraphDef,
    model_state: nnx.State,
    latents: jax.Array,
    conditioning: Conditioning,
    shift: jax.Array,
    final_step_ratio: jax.Array,
    *,
    steps: int,
) -> jax.Array:
    """The student's latent tokens [B, N, 4C] in `steps` network calls.

    Args:
      graphdef, model_state: an `ArcModel` with a student, split.
      latents: noise [B, N, 4C].
      conditioning: of the backbone, batch first.
      shift, final_step_ratio: the student's time warp and segments.
    """
    model = nnx.merge(graphdef, model_state)

    def student(x: jax.Array, sigma: jax.Array) -> Any:
        return model.student_curve(x, sigma, conditioning)

    return sampler.sample(student, latents, steps=steps, shift=shift, final_step_ratio=final_step_ratio)


@functools.partial(jax.jit, static_argnames=("graphdef", "steps"))
def sample_teacher(
    graphdef: nnx.GraphDef,
    model_state: nnx.State,
    latents: jax.Array,
    conditioning: Conditioning | Guided,
    shift: jax.Array,
    terminal: jax.Array | None,
    *,
    steps: int,
) -> jax.Array:
    """The teacher's latent tokens [B, N, 4C] in `steps` Euler steps.

    Arguments as for `sample_student`; `conditioning` may also be `Guided`; `shift` and `terminal` as for
    `schedule.euler_grid`.
    """
    model = nnx.merge(graphdef, model_state)

    def teacher(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return model.teacher_velocity(x, sigma, conditioning)

    return sampler.euler(teacher, latents, steps=steps, shift=shift, terminal=terminal)


def teacher_grid(scheduler: dict[str, Any], tokens: int) -> tuple[jax.Array, jax.Array | None]:
    """Shift and terminal noise level (see `schedule.euler_grid`) that a model's scheduler has for so many tokens."""
    terminal = scheduler.get("shift_terminal")
    return jnp.float32(scheduler_shift(scheduler, tokens)), jnp.float32(terminal) if terminal else None


@functools.partial(jax.jit, static_argnames=("graphdef", "rows", "columns"))
def decode_latents(graphdef: nnx.GraphDef, vae: nnx.State, tokens: jax.Array, *, rows: int, columns: int) -> jax.Array:
    """Pixels [B, H, W, 3], uint8, of latent tokens [B, N, 4C]; `vae` needs no encoder."""
    tokens = constrain(tokens, "batch", None, None)
    pixels = nnx.merge(graphdef, vae).decode(unpack(tokens, rows, columns))
    return jnp.round(jnp.clip(pixels * 0.5 + 0.5, 0.0, 1.0) * 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"), donate_argnames="base")
def merge_student(graphdef: nnx.GraphDef, base: nnx.State, trained: nnx.State, mesh: Mesh) -> nnx.State:
    """The weights of the student for sampling, split over the mesh; takes the base's memory."""
    merged = merged_state(graphdef, base, trained)
    return jax.lax.with_sharding_constraint(merged, state_shardings(mesh, merged))


def seeded_noise(seed: int, count: int, tokens: int, channels: int, first: int = 0) -> jax.Array:
    """Standard normal [B, N, 4C]; picture i of a seed gets the same noise whatever the batch it is made in."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), first + jnp.arange(count))
    return jax.vmap(lambda key: jax.random.normal(key, (tokens, channels)))(keys)


def default_dtype() -> Any:
    """To compute in: bfloat16, but on a CPU, where that is slow, float32."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


@contextlib.contextmanager
def memory_watched(offload: bool) -> Iterator[None]:
    """Raises UserError, with what to try, where a device's memory does not suffice."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        ways = ["smaller pictures or batches", "more devices (mesh)", *([] if offload else ["offload"])]
        raise UserError(f"out of memory, try {', '.join(ways)}: {one_line(error)}") from error
