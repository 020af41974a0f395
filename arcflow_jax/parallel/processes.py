"""A run on several hosts, with one process per host (or per GPU).

Every process runs the same program on arrays that are sharded over the devices of all processes. Only two things
differ: each process loads its own slice of a batch, and only the first process writes what is not an array.
"""

# B batch

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from arcflow_jax import schema
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.parallel.failure import HEARTBEAT
from arcflow_jax.parallel.mesh import batched, replicated


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


def is_main() -> bool:
    """Whether this is the first process, which prints, and writes what is not an array."""
    return jax.process_index() == 0


def local_part(mesh: Mesh) -> tuple[int, int]:
    """Which slice of the global batch this process must load, as (index, number of slices).

    Slices are equal. Processes may load the same one: if the mesh has all devices on `tensor`, each process loads the
    whole batch, (0, 1).
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    held = batched(mesh).addressable_devices_indices_map((shards,)).values()
    rows = [row for (index,) in held for row in range(*index.indices(shards))]
    first, last = min(rows), max(rows)
    counts = (count for count in range(shards, 0, -1) if shards % count == 0)
    return next((first * n // shards, n) for n in counts if first * n // shards == last * n // shards)


def from_part(part: np.ndarray, mesh: Mesh) -> jax.Array:
    """The global batch [B, …], sharded over the mesh, from the slice that each process has loaded (`local_part`).

    If B is not divisible by the data axes of the mesh, the batch is replicated. That works with one process only.
    """
    index, count = local_part(mesh)
    batch, first = len(part) * count, len(part) * index
    divides = batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    sharding = batched(mesh) if divides else replicated(mesh)

    def rows(held: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = held[0].indices(batch)
        return part[start - first : stop - first]

    return jax.make_array_from_callback((batch, *part.shape[1:]), sharding, rows)
