"""A run on several hosts, with one process per host (or per GPU).

Every process runs the same program on arrays that are sharded over the devices of all processes. Only two things
differ: each process loads the rows of a batch that its devices hold, and only the first process writes what is not an
array.
"""

# B batch

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from arcflow_jax import schema
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.parallel.mesh import row_sharding

HEARTBEAT = 30  # seconds of silence after which JAX takes a process for dead


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Connects the processes of a run. Call it before anything else asks JAX for its devices.

    Without arguments JAX detects the processes, on TPU pods, under SLURM, Open MPI and others (see
    `jax.distributed.initialize`). If it detects none, or JAX is already in use, this is a run of one process.

    Args:
      coordinator: HOST:PORT where the first process, on that host, waits for the others.
      processes: the number of processes.
      process: the index of this process, from 0.

    Raises:
      UserError: if only some arguments are given, if one is invalid, or if the processes cannot connect.
    """
    given = (coordinator, processes, process)
    if given == (None, None, None):
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        except (ValueError, RuntimeError) as error:
            if not any(reason in str(error) for reason in ("coordinator_address", "must be called before")):
                raise
        return
    if None in given:
        raise UserError("--coordinator, --processes and --process-id belong together: give all three, or none")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator is {coordinator!r}, but has to be HOST:PORT")
    schema.converted(schema.Count, processes, "--processes")
    if not 0 <= process < processes:
        raise UserError(f"--process-id is {process}, but of {processes} processes it has to be 0 to {processes - 1}")
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT)
    except RuntimeError as error:
        raise UserError(f"{processes} processes could not connect at {coordinator}: {one_line(error)}") from None


def several() -> bool:
    """Whether this run has several processes. To find one only, it does not start JAX's devices."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def process_index() -> int:
    """The number of this process, from 0; as `several`."""
    return jax.process_index() if several() else 0


def is_main() -> bool:
    """Whether this is the first process, which prints, and writes what is not an array."""
    return process_index() == 0


def local_rows(mesh: Mesh, batch: int) -> list[int]:
    """Which rows of a global batch this process's devices hold, in order. It loads these, and no others.

    They need not be neighbours. Two processes hold the same row if `tensor` or `sequence` spans both.
    """
    held = row_sharding(mesh, batch).addressable_devices_indices_map((batch,)).values()
    return sorted({row for (index,) in held for row in range(batch)[index]})


def from_rows(own: np.ndarray, mesh: Mesh) -> jax.Array:
    """The global batch [B, …], sharded over the mesh, from the rows that each process has loaded (`local_rows`).

    If B is not divisible by the data axes of the mesh, the batch is replicated. That works with one process only.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = len(own) * shards // len(local_rows(mesh, shards))
    rows = local_rows(mesh, batch)

    def of_device(index: tuple[slice, ...]) -> np.ndarray:
        held = range(batch)[index[0]]  # neighbours
        first = rows.index(held[0])
        return own[first : first + len(held)]

    return jax.make_array_from_callback((batch, *own.shape[1:]), row_sharding(mesh, batch), of_device)
