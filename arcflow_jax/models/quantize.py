"""Writes a model directory again with quantized kernels, layer by layer, as `conversion` does from the source."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from rich.progress import Progress

from arcflow_jax.arrays.names import in_memory
from arcflow_jax.arrays.orbax import handler, place
from arcflow_jax.arrays.writer import Stream, write_checkpoint
from arcflow_jax.console import progress_bar
from arcflow_jax.data.tokenizers import copy_tokenizer
from arcflow_jax.errors import UserError
from arcflow_jax.models.kernels import Formats, digested, formats_of, quantized_streams
from arcflow_jax.models.model_directory import (
    CHECKPOINT,
    DESCRIPTION,
    FORMAT,
    VERSION,
    ModelDirectory,
    fingerprint,
    unreadable,
)
from arcflow_jax.networks.kernel import Format
from arcflow_jax.networks.quantization import Quantization
from arcflow_jax.networks.states import nest, unnest
from arcflow_jax.storage.atomic import new_output, whole_directory
from arcflow_jax.storage.files import write_own
from arcflow_jax.storage.paths import as_path, sizes_below


def quantize_model(model: str | Path, out: str | Path, quantize: Formats) -> Path:
    """Writes the model directory `out` from the model directory `model`, and returns `out`, complete or not at all.

    Args:
      quantize: as for `conversion.convert_model`.

    Raises:
      UserError: if the model is damaged, a component is quantized already, or `out` cannot be written.
    """
    directory, out = ModelDirectory.open(model), as_path(out).absolute()
    entries = directory.description.components
    formats = formats_of(directory.family, quantize)
    for name in formats:
        if (quantization := directory.quantization(name)) is not None:
            raise UserError(f"{model}: {name} is quantized to {quantization.format} already")
    if any(entry.stored is None for entry in entries.values()):
        raise UserError(f"{model} is of format version 1, which has no checksums: convert the model again")
    with new_output(out, DESCRIPTION), progress_bar(of_bytes=True) as progress:
        copies = {name: Copy(directory, name, formats.get(name), progress) for name in directory.networks}
        with whole_directory(out, sum(copy.bytes for copy in copies.values())) as aside:
            for name in directory.family.tokenizers:
                copy_tokenizer(directory.tokenizer(name), aside / name, directory.path)
            for name, copy in copies.items():
                write_checkpoint(aside / name / CHECKPOINT, nest(copy.streams))
            components = {
                name: dataclasses.replace(
                    entry,
                    stored=fingerprint(copies[name].digests),
                    quantization=copies[name].quantization or entry.quantization,
                )
                for name, entry in entries.items()
            }
            description = dataclasses.replace(directory.description, components=components, files=sizes_below(aside))
            write_own(aside / DESCRIPTION, description, FORMAT, VERSION)
    return out


class Copy:
    """A component that is written again.

    Attributes:
      quantization: what is quantized on the way.
      streams: the arrays to be written, by their paths on disk.
      digests: of those that have been written.
    """

    def __init__(self, directory: ModelDirectory, name: str, format: Format | None, progress: Progress):
        directory.check_files(name)
        self.where = directory.path / name
        self.quantization: Quantization | None = None
        if format is not None:
            self.quantization = directory.networks[name].quantization(directory.config(name), format)
        self.digests: list[tuple[str, bytes]] = []
        self.context = ocp.type_handlers.get_ts_context(use_ocdbt=True)
        with self.telling_why():
            stored = unnest(handler().metadata(place(self.where / CHECKPOINT)).tree)
        total = sum(np.dtype(array.dtype).itemsize * int(np.prod(array.shape)) for array in stored.values())
        self.progress, self.task = progress, progress.add_task(name, total=total, text="")
        streams = [self.streams_of(path, array.shape, array.dtype) for path, array in stored.items()]
        self.streams = {path: stream for each in streams for path, stream in each.items()}

    def streams_of(self, path: str, shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Stream]:
        """The streams of one array."""
        target, stacked = in_memory(path), len(shape) > 2

        def read() -> Iterator[np.ndarray]:
            array = self.open(path)
            for part in (array[i] for i in range(shape[0])) if stacked else (array,):
                with self.telling_why():
                    layer = part.read().result()
                yield layer
                self.progress.advance(self.task, layer.nbytes)

        if self.quantization is not None and (format := self.quantization.of_kernel(target)) is not None:
            return quantized_streams(target, shape, format, read, self.digests)
        return {path: Stream(shape, dtype, stacked, lambda: digested(target, shape, dtype, read(), self.digests))}

    def open(self, path: str) -> ts.TensorStore:
        """A stored array, of which no values have been read. Raises UserError."""
        info = ocp.type_handlers.ParamInfo(
            name=path,
            parent_dir=place(self.where / CHECKPOINT),
            is_ocdbt_checkpoint=True,
            use_zarr3=True,
            ts_context=self.context,
        )
        with self.telling_why():
            spec = ts.Spec(ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True))
            return ts.open(spec, context=self.context).result()

    @contextlib.contextmanager
    def telling_why(self) -> Iterator[None]:
        """Inside the `with` block, a failed read is a UserError."""
        try:
            yield
        except Exception as error:  # TensorStore raises all kinds of errors
            raise unreadable(self.where, error) from error

    @property
    def bytes(self) -> int:
        """Size of what is written."""
        return sum(stream.bytes for stream in self.streams.values())
