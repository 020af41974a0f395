"""Compiles a run's training steps before the first one: one program a phase and image size."""

# B batch, N tokens, R tokens of reference images, C latent channels

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from arcflow_jax.errors import UserError, one_line, out_of_memory
from arcflow_jax.networks.conditioning import References, referring
from arcflow_jax.parallel.mesh import sharded
from arcflow_jax.parallel.offload import to_device, to_host
from arcflow_jax.training.state import OF_GRADIENT, OF_UPDATE, TrainState, gradient, train_step, update
from arcflow_jax.training.work import flops

Grid = tuple[int, int]  # rows and columns of tokens


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled training step, to be called with its positional arguments.

    Attributes:
      compiled: by XLA; in one part or in two, between which EMA weights and optimizer state come from host memory.
      flops: operations of a call, on all devices together.
    """

    compiled: list[jax.stages.Compiled]
    flops: int

    def __call__(self, state: TrainState, *others: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        if len(self.compiled) == 1:
            return self.compiled[0](state, *others)
        first, second = self.compiled
        # Waits, because a transfer takes the device's memory when it is asked for
        result = jax.block_until_ready(first(state.step, state.adapter, *others))
        state, log = second(state.moved(to_device), *result)
        return state.moved(to_host), log


def parts(
    state: TrainState, others: tuple[Any, ...], settings: dict[str, Any], mesh: Mesh, offload: bool
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What a training step is compiled as: functions with their arguments, and keyword arguments.

    Args:
      state, others: arguments of `train_step`; arrays, or shapes with shardings.
      settings: its keyword arguments.
      offload: whether EMA weights and optimizer state are in host memory while the gradient is computed.
    """
    if not offload:
        return [(train_step, (state, *others), settings)]
    first, second = ({name: settings[name] for name in names} for names in (OF_GRADIENT, OF_UPDATE))
    inputs = (state.step, state.adapter, *others)
    _, log = gradient.eval_shape(*inputs, **first)
    on_device = sharded(mesh, jax.eval_shape(lambda x: x, state))
    return [(gradient, inputs, first), (update, (on_device, state.adapter, sharded(mesh, log)), second)]


def compile_steps(
    wanted: Collection[tuple[Grid, bool]],
    state: TrainState,
    base: Any,
    conditioning: Any,
    key: jax.Array,
    negative: Any,
    latents: jax.Array | None,
    settings: dict[str, Any],
    mesh: Mesh,
    offload: bool = False,
) -> dict[tuple[Grid, bool], Program]:
    """`train_step` compiled for each grid of tokens, in each phase.

    Args:
      wanted: grid, and whether the phase is the steady one.
      state, base, conditioning, key, negative, latents: of one training step, of any grid.
      settings: the step's keyword arguments, but `steady`.
      offload: see `parts`.

    Raises:
      UserError: if a program does not fit in a device's memory.
    """
    programs = {}
    for (rows, columns), steady in wanted:
        tokens = rows * columns
        placed = of_size(conditioning, tokens)
        images = None if latents is None else resized(latents, 1, tokens)
        with jax.set_mesh(mesh), memory_errors(tokens):
            others = (base, placed, key, negative, images)
            pieces = parts(state, others, settings | {"steady": steady}, mesh, offload)
            traced = [function.trace(*arguments, **keywords) for function, arguments, keywords in pieces]
            compiled = [each.lower().compile() for each in traced]
            programs[(rows, columns), steady] = Program(compiled, sum(flops(each.jaxpr.jaxpr) for each in traced))
    return programs


def of_size(conditioning: Any, tokens: int) -> Any:
    """The conditioning of images of N tokens, and of reference images that have the size of the images, as shapes."""
    placed = dataclasses.replace(conditioning, positions=resized(conditioning.positions, 0, tokens))
    references = getattr(conditioning, "references", None)
    if references is None:
        return placed
    count = references.tokens.shape[1] // len(conditioning.positions) * tokens  # R
    return referring(placed, References(resized(references.tokens, 1, count), resized(references.positions, 0, count)))


def resized(x: jax.Array, axis: int, size: int) -> jax.ShapeDtypeStruct:
    """The shape of an array, with another size of one axis."""
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    # An array that no one has placed goes where the program needs it
    sharding = x.sharding if x.committed else None
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding, weak_type=x.weak_type)


@contextlib.contextmanager
def memory_errors(tokens: int) -> Iterator[None]:
    """Inside the `with` block, a device that runs out of memory raises UserError, with what to try."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"out of memory in a training step of {tokens} image tokens: try a larger accumulate, remat=full, "
            "offload_optimizer=True, a larger fsdp, more devices, smaller images, or cached embeddings; arcflow "
            f"compile-report counts memory ({one_line(error)})"
        ) from error
