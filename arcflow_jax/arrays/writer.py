"""Writes arrays that are larger than memory to an Orbax checkpoint, layer by layer.

Orbax takes each array whole, and keeps copies of it while it writes. A `TypeHandler` can do otherwise: the leaves here
are `Stream`s, and their handler asks Orbax where and how an array is stored, then gives it to TensorStore one layer at
a time. The result is an ordinary checkpoint of NumPy arrays in the format zarr 3, with a checksum a chunk, which any
restore verifies.
"""

# L stacked layers

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from arcflow_jax.arrays.orbax import as_os_error, check_name, place

CHUNK_BYTES = 2**22  # the unit of reading: small enough for a sharded restore to skip most of what it does not need
# Each chunk ends with its XXH64 hash, which zstd compares when the chunk is read. (A CRC-32C would cost seven times
# as much.) All else that OCDBT stores has a CRC-32C anyway
CODECS = (
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 1, "checksum": True}},
)
IN_FLIGHT_BYTES = 2**27  # the most that is being written at a time, unless a single layer is larger


@dataclasses.dataclass(frozen=True)
class Stream:
    """An array that is made while it is written.

    Attributes:
      shape: of the array.
      dtype: of the array.
      stacked: whether it comes in layers, [L, ...]; otherwise it comes whole.
      read: makes its layers in order, or the one array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    read: Callable[[], Iterator[np.ndarray]]

    @property
    def bytes(self) -> int:
        """Size of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


async def create(stream: Stream, info: ocp.type_handlers.ParamInfo) -> ts.TensorStore:
    """Creates the empty array of a stream where Orbax stores it."""
    await info.await_path_creation()
    spec = ocp.type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=info.is_ocdbt_checkpoint,
        global_shape=stream.shape,
        # Chunks do not cross layers, or writing a layer would read and write its neighbours again
        local_shape=(1, *stream.shape[1:]) if stream.stacked else stream.shape,
        dtype=stream.dtype,
        process_index=ocp.multihost.process_index(),
        arg=ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES),
    )
    spec["metadata"]["codecs"] = CODECS
    return await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)


class StreamHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Stream`s as what `NumpyHandler` reads.

    Attributes:
      writing: the unfinished writes and the bytes of each, oldest first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writing: collections.deque[tuple[ts.Future, int]] = collections.deque()

    async def serialize(
        self,
        values: Sequence[Stream],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list[ocp.future.Future]:
        """Writes the streams one after the other. All is written when it returns."""
        # All at once, because TensorStore rewrites its index for each array that is created alone
        arrays = await asyncio.gather(*map(create, values, infos))
        for stream, array in zip(values, arrays, strict=True):
            for index, layer in enumerate(stream.read()):
                await self.wait(until=IN_FLIGHT_BYTES - layer.nbytes)
                view = array[index] if stream.stacked else array
                written = view.write(layer, can_reference_source_data_indefinitely=True).commit
                written.force()  # otherwise TensorStore starts only when the future is awaited
                self.writing.append((written, layer.nbytes))
        await self.wait(until=0)
        return []

    async def wait(self, until: int) -> None:
        """Waits until at most this many bytes are being written."""
        while self.writing and sum(size for _, size in self.writing) > until:
            await self.writing.popleft()[0]

    def settle(self) -> None:
        """Waits for the writes that are unfinished after an error."""
        while self.writing:
            with contextlib.suppress(Exception):
                self.writing.popleft()[0].result()


def write_checkpoint(path: Path, streams: Mapping[str, Any]) -> None:
    """Writes a nested dict of `Stream`s as the Orbax checkpoint `path`.

    Raises:
      OSError: if the disk is full or cannot be written.
      UserError: see `orbax.check_name`.
    """
    check_name(path)
    handler = StreamHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        (Stream, handler),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # for no array, but Orbax warns if it is missing
    )
    # Of several processes, one converts: it must not wait for the others
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process-{process}"
    )
    try:
        with ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_zarr3=True, multiprocessing_options=alone),
            multiprocessing_options=alone,
        ) as checkpointer:
            checkpointer.save(place(path), args=ocp.args.PyTreeSave(streams))
    except Exception as error:
        if (told := as_os_error(error, path)) in (None, error):
            raise
        raise told from error
    finally:
        handler.settle()
