"""What the processes of a run do together: wait, compare what they see, share work, and write one output."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import msgspec
import numpy as np
from jax._src import distributed  # its barrier has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from arcflow_jax.errors import UserError
from arcflow_jax.parallel.failure import ends_together
from arcflow_jax.parallel.processes import is_main, local_rows, several
from arcflow_jax.storage.atomic import new_output
from arcflow_jax.storage.files import digest
from arcflow_jax.storage.lock import one_writer, writing

T = TypeVar("T")

NONCE = ".shared"  # in a directory that all processes have to see
PATIENCE = 10  # seconds until a file of another host has to be seen
LONGEST = 10**9  # milliseconds to wait for the others: eleven days. If one dies, all end anyway
_waits = itertools.count()


def wait_for_all() -> None:
    """Waits until all processes have come here. Unlike JAX's collective operations it may take hours."""
    if several():
        distributed.global_state.client.wait_at_barrier(f"arcflow_jax/{next(_waits)}", timeout_in_ms=LONGEST)


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order. They consist of what JSON has, and of bytes."""
    if not several():
        return [value]
    wait_for_all()
    data = msgspec.msgpack.encode(value)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data))))
    found = np.asarray(multihost_utils.process_allgather(padded(data, max(sizes))))
    return [msgspec.msgpack.decode(each[:size].tobytes()) for each, size in zip(found, sizes, strict=True)]


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, the only one that calls it. Values as of `gathered`."""
    if not several():
        return make()
    data = msgspec.msgpack.encode(make()) if is_main() else b""
    wait_for_all()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    return msgspec.msgpack.decode(np.asarray(multihost_utils.broadcast_one_to_all(padded(data, size)))[:size].tobytes())


def padded(data: bytes, size: int) -> np.ndarray:  # [a power of two, at least size] uint8
    """Bytes as an array, of one of few lengths, because JAX compiles a program for each."""
    array = np.zeros(1 << int(size).bit_length(), np.uint8)
    array[: len(data)] = np.frombuffer(data, np.uint8)
    return array


def own_share(count: int, batch: int = 1) -> range:
    """Which of `count` items this process takes: neighbours, in the batches that one process would make of all."""
    index, processes = (jax.process_index(), jax.process_count()) if several() else (0, 1)
    batches = -(-count // batch)
    first, end = (min(i * batches // processes * batch, count) for i in (index, index + 1))
    return range(first, end)


def sum_over_rows(own: int, mesh: Mesh) -> int:
    """How many rows of all batches have a property, from how many each process has counted among those that it loads.

    Where `tensor` or `sequence` spans processes, several load the same rows (see `processes.local_rows`), which count
    once. All processes call it.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    counted, loaded = map(sum, zip(*gathered([own, len(local_rows(mesh, shards))]), strict=True))
    return counted * shards // loaded


def check_same(seen: Mapping[str, Any]) -> None:
    """Raises UserError in all processes if one has other values than the first. Its message has their names."""
    if not several():
        return
    every = gathered([digest([value]) for value in seen.values()])
    for i, what in enumerate(seen):
        if other := [process for process, digests in enumerate(every) if digests[i] != every[0][i]]:
            raise UserError(f"{what} differ on {named(other)}: all hosts have to start from the same")


def check_directory(out: Path) -> None:
    """Raises UserError in all processes if one does not see what the first one writes to a directory.

    All processes call it, once the first one has made the directory.
    """
    if not several():
        return
    blind = [i for i, sees in enumerate(gathered(sees_the_first(out))) if not sees]
    if is_main():
        (out / NONCE).unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"{out} is not the same directory on all hosts: {named(blind)} cannot see what process 0 writes there; "
            "name a directory on a shared disk or in a bucket"
        )


def sees_the_first(out: Path) -> bool:
    """Whether this process reads what the first one has just written to a directory."""

    def write() -> bytes:
        (out / NONCE).write_bytes(nonce := secrets.token_bytes(16))
        return nonce

    expected = from_first(write)
    end = time.monotonic() + PATIENCE  # a shared disk may show a new file late
    while True:
        with contextlib.suppress(OSError):
            if (out / NONCE).read_bytes() == expected:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def named(numbers: list[int]) -> str:
    """The numbers of processes, for an error message."""
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


@contextlib.contextmanager
def writing_together(out: Path, description: str | None = None) -> Iterator[None]:
    """Inside the `with` block the processes of this run are the one writer of `out`, whose lock the first one holds.

    It begins and ends in all of them at the same time, then the first one releases the lock. An error in one ends all.

    Args:
      description: of a directory that must not have content yet, see `atomic.new_output`.

    Raises:
      UserError: as `lock.one_writer` or `atomic.new_output`.
    """
    lock = one_writer(out) if description is None else new_output(out, description)
    with ends_together(), lock if is_main() else contextlib.nullcontext():
        wait_for_all()
        with writing(out):
            yield
        wait_for_all()
