"""Compiles a run's training steps before the first one: one program a phase and image size."""

# B batch, N tokens, C latent channels

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from arcflow_jax.errors import UserError, one_line, out_of_memory
from arcflow_jax.training.state import TrainState, train_step
from arcflow_jax.training.work import flops

Grid = tuple[int, int]  # rows and columns of tokens


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled training step, to be called with its positional arguments.

    Attributes:
      compiled: by XLA.
      flops: operations of a call, on all devices together.
    """

    compiled: jax.stages.Compiled
    flops: int

    def __call__(self, *arguments: Any) -> Any:
        return self.compiled(*arguments)


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
) -> dict[tuple[Grid, bool], Program]:
    """`train_step` compiled for each grid of tokens, in each phase.

    Args:
      wanted: grid, and whether the phase is the steady one.
      state, base, conditioning, key, negative, latents: of one training step, of any grid.
      settings: the step's keyword arguments, but `steady`.

    Raises:
      UserError: if a program does not fit in a device's memory.
    """
    programs = {}
    for (rows, columns), steady in wanted:
        tokens = rows * columns
        placed = dataclasses.replace(conditioning, positions=resized(conditioning.positions, 0, tokens))
        images = None if latents is None else resized(latents, 1, tokens)
        with jax.set_mesh(mesh), memory_errors(tokens):
            traced = train_step.trace(state, base, placed, key, negative, images, steady=steady, **settings)
            compiled = traced.lower().compile()
            programs[(rows, columns), steady] = Program(compiled, flops(traced.jaxpr.jaxpr))
    return programs


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
            f"out of memory in a training step of {tokens} image tokens: try a larger accumulate, remat=full, a larger "
            f"fsdp, more devices, smaller images, or cached embeddings; arcflow compile-report counts memory "
            f"({one_line(error)})"
        ) from error
