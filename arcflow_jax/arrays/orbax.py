"""How Orbax reads and writes our arrays: as always, but a failed read or write ends only when its siblings have ended.

Orbax gives up at the first array that fails and closes its event loop. TensorStore still reads or writes the other
arrays then, and reports to the closed loop. Each report prints a traceback that nobody can catch, and a late write
makes files again in a directory that has just been removed. The handlers here wait for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import re
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from arcflow_jax.arrays.replicas import read_once
from arcflow_jax.errors import UserError, cause_of
from arcflow_jax.storage.paths import in_bucket

T = TypeVar("T")


class Lazily:
    """An awaitable that makes its coroutine only when it is awaited.

    After an error Orbax never awaits some of them, and Python would print a warning for each coroutine.
    """

    def __init__(self, begin: Callable[[], Coroutine[Any, Any, Any]]):
        self.begin = begin

    def __await__(self) -> Any:
        return self.begin().__await__()


async def settled(read: Coroutine[Any, Any, T]) -> T:
    """Awaits a read of many arrays. If one fails, the others have ended when the error is raised."""
    before = asyncio.all_tasks()
    try:
        return await read
    except Exception:
        if others := asyncio.all_tasks() - before:
            await asyncio.gather(*others, return_exceptions=True)
        raise


def close_settled(loop: asyncio.AbstractEventLoop) -> None:
    """Makes an event loop wait for its tasks before it closes."""
    close = loop.close

    def settle_and_close() -> None:
        if others := asyncio.all_tasks(loop):
            loop.run_until_complete(asyncio.gather(*others, return_exceptions=True))
        close()

    loop.close = settle_and_close


def settling(info: ocp.type_handlers.ParamInfo) -> ocp.type_handlers.ParamInfo:
    """The description of an array to be written, which makes the loop that writes it close as `close_settled` says.

    Orbax writes in a thread and a loop of its own. There it first waits for the directory: that is the way in.
    """
    info = copy.copy(info)
    wait_for_directory = info.await_path_creation

    async def await_path_creation() -> None:
        close_settled(asyncio.get_running_loop())
        await wait_for_directory()

    info.await_path_creation = await_path_creation
    return info


class Arrays(ocp.type_handlers.ArrayHandler):
    """Reads arrays to devices, and writes them from there."""

    def __init__(self) -> None:
        super().__init__()
        self.writing: Sequence[ocp.future.Future] = ()  # of the last save

    async def serialize(
        self,
        values: Sequence[jax.Array],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[ocp.future.Future]:
        first, *rest = infos
        self.writing = await super().serialize(values, [settling(first), *rest], args)
        return self.writing

    def settle(self) -> None:
        """Waits for all writes of the last save. Orbax raises the error of the first, and leaves the others running."""
        for future in self.writing:
            with contextlib.suppress(Exception):
                future.result()

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[jax.Array]:
        def read(infos: Sequence[Any], args: Sequence[Any] | None) -> Coroutine[Any, Any, Sequence[jax.Array]]:
            return settled(super(Arrays, self).deserialize(infos, args))

        return await (read(infos, args) if jax.process_count() == 1 else read_once(read, infos, args))

    def metadata(self, *args: Any) -> Any:
        return Lazily(lambda: settled(super(Arrays, self).metadata(*args)))


class NumPyArrays(ocp.type_handlers.NumpyHandler):
    """Reads the shapes of what the converter has written, which are NumPy arrays."""

    def metadata(self, *args: Any) -> Any:
        return Lazily(lambda: settled(super(NumPyArrays, self).metadata(*args)))


def as_os_error(error: Exception, path: Path) -> OSError | None:
    """The OSError that a failed write to `path` is, or that it reports in TensorStore's form; None if there is none."""
    if isinstance(error, OSError) and error.strerror:
        return error
    if in_bucket(path) and cause_of(error) in ("permission", "network"):
        return path.clear_error(error, write=True)
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else None


def clear_cause(error: Exception, path: Path) -> Exception:
    """The error of a failed read of `path`; of a bucket that denies access, one that names bucket and permission."""
    if not (in_bucket(path) and cause_of(error) == "permission"):
        return error
    return PermissionError(path.clear_error(error).strerror)


def place(path: Path) -> Path:
    """The same path as Orbax takes it: absolute, and on s3:// only if Orbax has learnt that."""
    if str(path).startswith("s3://"):
        from arcflow_jax.arrays import s3

        s3.enable()
    return path.absolute()


def check_name(path: Path) -> None:
    """Raises UserError if `path` has the characters of a glob pattern: Orbax would not find its own files there."""
    if set(str(path)) & set("*?[\\"):
        raise UserError(f"cannot write checkpoints to {path}: name a directory without *, ?, [ or \\ in its path")


def handler(arrays: Arrays | None = None, at_once: int | None = None) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of a checkpoint: a nested dict of arrays, which `arrays` reads and writes.

    Args:
      at_once: about the most bytes that are read at a time, at least those of the largest array. While it is read, host
        memory holds an array beside its copy on the device.
    """
    handlers = ((jax.Array, arrays or Arrays()), (np.ndarray, NumPyArrays()))
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(*handlers),
        restore_concurrent_gb=None if at_once is None else at_once // 10**9 + 1,  # Orbax wants more than that
    )


def misfits(wanted: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """The arrays that a checkpoint lacks, or has in another shape than wanted."""
    sizes = [
        {jax.tree_util.keystr(path, simple=True, separator="."): tuple(x.shape) for path, x in leaves}
        for leaves in map(jax.tree.leaves_with_path, (wanted, stored))
    ]
    return sorted(
        f"{name}: {sizes[1].get(name, 'none')} there, {shape} here"
        for name, shape in sizes[0].items()
        if sizes[1].get(name) != shape
    )
