"""A run on several hosts: one process a host (or a GPU), which see one another's devices.

Every process runs the same program on arrays that are split over all devices. What a process has to do by itself is
little: read its own part of a batch, and, if it is the first, write what is not an array.
"""

# B batch

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from arcflow_jax.errors import UserError, one_line
from arcflow_jax.parallel.mesh import batched, replicated


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the processes of a run; has to come before anything else asks JAX for its devices.

    Without arguments JAX finds out by itself, on TPU pods, under SLURM, Open MPI and others (see
    `jax.distributed.initialize`); where there is nothing to find, or JAX is in use already, this process is the only
    one.

    Args:
      coordinator: HOST:PORT at which the first process, which has to be on that host, waits for the others.
      processes: how many there are.
      process: which one this is, from 0.

    Raises:
      UserError: if only some are given, they make no sense, or the processes did not find together.
    """
    given = (coordinator, processes, process)
    if given == (None, None, None):
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            if not any(reason in str(error) for reason in ("coordinator_address", "must be called before")):
                raise
        return
    if None in given:
        raise UserError("--coordinator, --processes and --process-id go together: give all three, or none")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator is {coordinator!r}, but has to be HOST:PORT")
    if not 0 <= process < processes:
        raise UserError(f"--process-id is {process}, of --processes {processes} it has to be from 0 to {processes - 1}")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except RuntimeError as error:
        raise UserError(f"{processes} processes did not find together at {coordinator}: {one_line(error)}") from None


def is_main() -> bool:
    """Whether this is the process that prints, and writes what is not an array."""
    return jax.process_index() == 0


def local_part(mesh: Mesh) -> tuple[int, int]:
    """(index, count): of the even parts of a batch, the smallest that holds all that this process's devices hold.

    That is its own part, if the process's devices stand together in the mesh. They may share it with others: under
    tensor = all devices, every process has the whole batch.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    held = batched(mesh).addressable_devices_indices_map((shards,)).values()
    rows = [row for (index,) in held for row in range(*index.indices(shards))]
    first, last = min(rows), max(rows)
    counts = (count for count in range(shards, 0, -1) if shards % count == 0)
    return next((first * n // shards, n) for n in counts if first * n // shards == last * n // shards)


def from_part(part: np.ndarray, mesh: Mesh) -> jax.Array:
    """The batch [B, …] that is split over all processes' devices, of which each process brings its `local_part`.

    A batch that does not divide by the mesh's data axes is whole on every device; it takes a single process.
    """
    index, count = local_part(mesh)
    batch, first = len(part) * count, len(part) * index
    divides = batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    sharding = batched(mesh) if divides else replicated(mesh)

    def rows(held: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = held[0].indices(batch)
        return part[start - first : stop - first]

    return jax.make_array_from_callback((batch, *part.shape[1:]), sharding, rows)
