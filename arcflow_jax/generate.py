"""The jitted programs that make images: the student's sampler, the teacher's, the decoder, and what they start from.

Weights, latents, conditioning and scales are arguments, so that a program is compiled once for each shape and number of
steps, whatever the prompts.
"""

# B images, N tokens, C latent channels

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from arcflow_jax import schema
from arcflow_jax.errors import UserError, one_line, out_of_memory
from arcflow_jax.families.latents import token_side, unpack
from arcflow_jax.flow import sampler
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.conditioning import Conditioning, Guided
from arcflow_jax.networks.student import merged_state
from arcflow_jax.parallel.fits import INT4, INT8, Load, Offload, explained, gpu_share
from arcflow_jax.parallel.mesh import MESH_AXES, capability_of, constrain, parse_mesh, sharded, state_shardings

TEACHER_STEPS = 50  # the default for the teacher
# Pixels above which an image is decoded in tiles by default. Up to there, FLUX.1's VAE needs 5.7 GiB, which JAX takes
# of an 8 GB card
TILED = 1536**2


@functools.partial(jax.jit, static_argnames=("graphdef", "steps"))
def sample_student(
    graphdef: nnx.GraphDef,
    model_state: nnx.State,
    latents: jax.Array,
    conditioning: Conditioning,
    shift: jax.Array,
    final_step_ratio: jax.Array,
    start: jax.Array | None = None,
    known: sampler.Known | None = None,
    *,
    steps: int,
) -> jax.Array:
    """The student's latent tokens [B, N, 4C] with an NFE of `steps`.

    Args:
      graphdef, model_state: an `ArcModel` with a student, split; LoRA merged into the base model or beside it.
      latents: noise [B, N, 4C], or of noise level `start`.
      conditioning: of the backbone, batch first.
      shift: the student's timestep shift.
      final_step_ratio: length of its last segment relative to the others.
      start, known: see `sampler.sample`.
    """
    model = nnx.merge(graphdef, model_state)

    def student(x: jax.Array, sigma: jax.Array) -> Any:
        return model.student_curve(x, sigma, conditioning)

    times = {"steps": steps, "shift": shift, "final_step_ratio": final_step_ratio}
    return sampler.sample(student, latents, **times, start=start, known=known)


@functools.partial(jax.jit, static_argnames=("graphdef", "steps"))
def sample_teacher(
    graphdef: nnx.GraphDef,
    model_state: nnx.State,
    latents: jax.Array,
    conditioning: Conditioning | Guided,
    shift: jax.Array,
    terminal: jax.Array | None,
    start: jax.Array | None = None,
    known: sampler.Known | None = None,
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

    return sampler.euler(teacher, latents, steps=steps, shift=shift, terminal=terminal, start=start, known=known)


def teacher_grid(
    directory: ModelDirectory, tokens: int, steps: int = TEACHER_STEPS
) -> tuple[jax.Array, jax.Array | None]:
    """Timestep shift and terminal noise level σ of a model's scheduler, for N tokens, see `schedule.euler_grid`."""
    scheduler, log_shift = directory.scheduler, directory.family.log_shift
    shift = scheduler.shift_for(tokens, None if log_shift is None else log_shift(tokens, steps))
    terminal = scheduler.shift_terminal
    return jnp.float32(shift), jnp.float32(terminal) if terminal else None


@functools.partial(jax.jit, static_argnames=("graphdef", "rows", "columns", "tiled"))
def decode_latents(
    graphdef: nnx.GraphDef, vae: nnx.State, tokens: jax.Array, *, rows: int, columns: int, tiled: bool | None = None
) -> jax.Array:
    """Pixels [B, H, W, 3], uint8, of latent tokens [B, N, 4C]; `vae` needs no encoder.

    Large images are decoded in tiles, others if `tiled` says so, see `networks.vaes.vae`.
    """
    tokens = constrain(tokens, "batch", None, None)
    network = nnx.merge(graphdef, vae)
    side = token_side(network.config.factor)
    large = rows * columns * side**2 > TILED
    pixels = network.decode(unpack(tokens, rows, columns), tiled=large if tiled is None else tiled)
    return jnp.round(jnp.clip(pixels * 0.5 + 0.5, 0.0, 1.0) * 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"), donate_argnames="base")
def merge_student(graphdef: nnx.GraphDef, base: nnx.State, trained: nnx.State, mesh: Mesh) -> nnx.State:
    """The student's weights for sampling: LoRA added to the base model's weights, whose memory is reused.

    The sums are rounded to the precision of the base model; bfloat16 keeps 8 bits of a weight. On the bundled teacher
    that error is a seventh of that of bfloat16 arithmetic (benchmarks/merge_precision.py).
    """
    merged = merged_state(graphdef, base, trained)
    return jax.lax.with_sharding_constraint(merged, state_shardings(mesh, merged))


def merges(directory: ModelDirectory, merge: bool | None, offload: Offload | None = None) -> bool:
    """Whether LoRA is merged: by default if it can be. Raises UserError if it is to be, and cannot be."""
    quantization = directory.quantization("transformer")
    where = "blocks in host memory" if offload == "blocks" else f"{quantization.format} weights" if quantization else ""
    if merge and where:
        raise UserError(f"LoRA cannot be merged into {where}: leave merge out")
    return not where if merge is None else merge


def random_key(seed: int) -> jax.Array:
    """The key of a seed from 0 to 2⁶⁴ − 1: `jax.random.key` would drop the upper half. Raises UserError on others."""
    seed = schema.converted(schema.Seed, seed, "seed")
    return jax.random.wrap_key_data(jnp.array([seed >> 32, seed % 2**32], jnp.uint32), impl="threefry2x32")


def seeded_noise(seed: int, count: int, tokens: int, channels: int, first: int = 0) -> jax.Array:
    """Standard normal [B, N, 4C]; image i of a seed gets the same noise whatever its batch."""
    return _noise(random_key(seed), first, count, tokens, channels)


# One program, which the compilation cache keeps: its parts are too small for it, and were compiled in every process
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _noise(key: jax.Array, first: jax.Array, count: int, tokens: int, channels: int) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count))
    return jax.vmap(lambda key: jax.random.normal(key, (tokens, channels)))(keys)


@functools.partial(jax.jit, static_argnames=("tokens", "channels"))
def noise_of_each(seeds: jax.Array, numbers: jax.Array, *, tokens: int, channels: int) -> jax.Array:
    """The noise [B, N, 4C] of images that have a seed each: of image `numbers[i]` of a seed, as `seeded_noise`.

    Args:
      seeds: upper and lower half of each seed, [B, 2] uint32.
      numbers: [B].
    """
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(seeds, impl="threefry2x32"), numbers)
    return jax.vmap(lambda key: jax.random.normal(key, (tokens, channels)))(keys)


def sampling_mesh(mesh: str | Mesh) -> Mesh:
    """The mesh to sample on, with our four axes, from a text (see `parse_mesh`) or a caller's own mesh.

    A caller's mesh may have some of our axes (`MESH_AXES`), in any order: those that it lacks have size 1. A mesh of
    one device may have any axes. Its axis types do not matter: XLA chooses the shardings here (`AxisType.Auto`).

    Raises:
      UserError: on a text that is not a mesh, more devices than there are, or other axes.
    """
    if isinstance(mesh, str):
        return parse_mesh(mesh)
    axes, devices = mesh.axis_names, mesh.devices
    if devices.size > 1:
        if unknown := [str(axis) for axis in axes if axis not in MESH_AXES]:
            raise UserError(
                f"the mesh has axes {', '.join(map(str, axes))}: {', '.join(unknown)} is none of "
                f"{', '.join(MESH_AXES)}, which say what is split"
            )
        devices = devices.transpose([axes.index(axis) for axis in MESH_AXES if axis in axes])
    return Mesh(devices.reshape([mesh.shape.get(axis, 1) if devices.size > 1 else 1 for axis in MESH_AXES]), MESH_AXES)


def default_dtype() -> Any:
    """The precision of weights and transformer: bfloat16 where the device computes it.

    float32 on a CPU, where bfloat16 is slow; float16 on NVIDIA GPUs before compute capability 8.0, with text encoders
    and VAE in float32 (`networks.float16`). All AMD GPUs that JAX supports have bfloat16.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return jnp.float32
    capability = capability_of(device)
    return jnp.float16 if capability is not None and capability < (8, 0) else jnp.bfloat16


@contextlib.contextmanager
def memory_watched(offload: bool, load: Callable[[], Load] | None = None) -> Generator[None]:
    """Inside the `with` block, a device that runs out of memory raises UserError, with what to try.

    Where the device tells its memory, the error says what of the `load` would fit.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if load is not None and limit:
            text = explained(load(), device.device_kind, limit, memory_share(device))
            raise UserError(f"out of memory: {text}: {one_line(error)}") from error
        ways = ["smaller images or batches", "more devices (mesh)", *([] if offload else ["offload"])]
        raise UserError(f"out of memory, try {', '.join(ways)}: {one_line(error)}") from error


def memory_share(device: jax.Device) -> float | None:
    """The part of a GPU's memory that JAX takes; None of other devices, which it has whole.

    It stays as JAX has it, because it cannot know what else needs the card: a display, or another process.
    """
    return gpu_share() if device.platform == "gpu" else None


def load_of(directory: ModelDirectory, dtype: Any, mesh: Mesh, *, offload: Offload | None, tiled: bool | None) -> Load:
    """What a pipeline of a model puts on one device, at the model's own image size."""

    def held(name: str) -> float:
        network: Any = directory.abstract(name, dtype)
        state = nnx.state(network.decoder_alone() if name == "vae" else network)
        parts = jax.tree.leaves(sharded(mesh, state))
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in parts)

    components = {name: held(name) for name in directory.networks}
    quantization = directory.quantization("transformer")
    bits = 8 * jnp.dtype(dtype).itemsize if quantization is None else INT4 if quantization.format == "int4" else INT8
    return Load(components, bits, offload, bool(tiled), directory.config("vae").sample_size or 1024)
