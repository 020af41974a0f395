"""The tensors of a component folder (transformer/, vae/, …) or of a single file, by name, read from disk one at a time.

A folder holds one safetensors file, or shards with an index, with the file names of diffusers and transformers.
Pickled weights are refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from arcflow_jax import schema
from arcflow_jax.errors import UserError, first_few, one_line
from arcflow_jax.schema import Size
from arcflow_jax.storage.atomic import write_file
from arcflow_jax.storage.files import cannot_read, file_size, is_inside, parse_json, read_json, read_range
from arcflow_jax.storage.paths import in_bucket

STEMS = ("diffusion_pytorch_model", "model")  # file names of diffusers and of transformers
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NO_PICKLES = (
    "unpickling runs any code that a file contains, so only safetensors are read; save the model as safetensors first"
)
HEADER = 100_000_000  # bytes, as in the safetensors library
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor that stays on disk until `np.asarray` reads it.

    It is read by its offset, not through a memory map as in the safetensors library: mapped pages count as resident
    memory, so in the end a 10 GB shard would be resident as a whole.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, rows: slice) -> FileTensor:
        """Some rows of its first axis, still on disk."""
        start, stop, _ = rows.indices(self.shape[0])
        shape = (stop - start, *self.shape[1:])
        return dataclasses.replace(
            self, offset=self.offset + start * math.prod(self.shape[1:]) * self.dtype.itemsize, shape=shape
        )

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        size = math.prod(self.shape)
        with cannot_read(self.path):
            if in_bucket(self.path):
                end = self.offset + size * self.dtype.itemsize
                array = np.frombuffer(self.path.read_bytes(self.offset, end) if size else b"", self.dtype)
            else:
                array = np.fromfile(self.path, self.dtype, size, offset=self.offset)
        if array.size != size:
            raise UserError(f"{self.path} became shorter while it was being read")
        return array.reshape(self.shape).astype(dtype or self.dtype, copy=False)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, complete or not at all. Raises OSError."""
    # The library takes the bytes as they lie in memory, also those of a transposed view
    rows = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    write_file(path, save(rows, dict(metadata or {}) or None))


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a safetensors header says of one tensor: `data_offsets` are its first byte and that after its last."""

    dtype: str
    shape: tuple[Size, ...]
    data_offsets: tuple[Size, Size]

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {self.dtype!r}, which is not supported")
        start, end = self.data_offsets
        if end - start != math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize:
            raise UserError(f"data_offsets are {start} and {end}, which its shape and dtype do not fill")


def read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of one safetensors file.

    Raises:
      UserError: if the file is missing, truncated or corrupt, or has a dtype that is not in `DTYPES`.
    """
    header, first = parse_header(path)
    header.pop("__metadata__", None)
    entries = {name: schema.parse(Entry, value, f"{path}: {one_line(name)}") for name, value in header.items()}
    end, room = 0, file_size(path) - first
    if cut := [name for name, entry in entries.items() if entry.data_offsets[1] > room]:
        raise damaged(path, f"it ends before {len(cut)} of its tensors ({first_few(cut)})")
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.data_offsets[0] != end:
            raise damaged(path, f"{one_line(name)} does not begin where the tensor before it ends")
        end = entry.data_offsets[1]
    if end != room:
        raise damaged(path, f"{room - end} bytes follow its last tensor")
    return {
        name: FileTensor(path, first + entry.data_offsets[0], entry.shape, np.dtype(DTYPES[entry.dtype]))
        for name, entry in entries.items()
    }


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file has besides tensors. Raises UserError if it is damaged."""
    found = schema.nested(parse_header(path)[0], "__metadata__")
    return schema.converted(dict[str, str], found, f"{path}: __metadata__")


def parse_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and at which byte the tensors begin. Raises UserError if it is damaged."""
    size = file_size(path)
    with cannot_read(path):
        length = int.from_bytes(read_range(path, 0, 8), "little") if size >= 8 else 0
        if not 0 < length <= min(HEADER, size - 8):
            raise damaged(path, "it has no header")
        text = read_range(path, 8, 8 + length)
    try:
        return parse_json(text, path), 8 + length
    except UserError as error:
        raise damaged(path, f"its header {str(error).removeprefix(f'{path} ')}") from None


def damaged(path: Path, why: str) -> UserError:
    """The error of a damaged file."""
    return UserError(f"{path} is truncated or corrupt: {why}")


def read_file(path: Path) -> dict[str, FileTensor]:
    """Name → tensor of one file that the user has named.

    Raises:
      UserError: if the file is missing or damaged, or holds pickles.
    """
    if path.suffix in PICKLES:
        raise UserError(f"{path} is a pickle: {NO_PICKLES}")
    return read_header(path)


def read_folder(folder: Path) -> dict[str, FileTensor]:
    """Name → tensor of all files of a component folder.

    Raises:
      UserError: if the folder, its weights or a shard is missing, a file is damaged, the weights are pickles, or
        index and shards disagree.
    """
    if not folder.is_dir():
        raise UserError(f"component folder {folder} is missing")
    for stem in STEMS:
        if (folder / f"{stem}.safetensors").is_file():
            return read_header(folder / f"{stem}.safetensors")
        if (folder / f"{stem}.safetensors.index.json").is_file():
            return read_shards(folder / f"{stem}.safetensors.index.json")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise UserError(f"{folder} holds pickled weights only ({first_few(pickles)}): {NO_PICKLES}")
    expected = " or ".join(f"{stem}.safetensors[.index.json]" for stem in STEMS)
    raise UserError(f"{folder} holds no weights: there is no {expected}")


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The content of an index: the file of each tensor, by the tensor's name."""

    weight_map: dict[str, str]

    def __post_init__(self):
        if outside := sorted({file for file in self.weight_map.values() if not is_inside(file) or "/" in file}):
            raise UserError(f"weight_map has {first_few(outside)}, but has to have files of its own folder")


def read_shards(index: Path) -> dict[str, FileTensor]:
    """The tensors of the shards that an index names. Raises UserError if index and shards disagree."""
    files = schema.parse(ShardIndex, read_json(index), index).weight_map
    missing = sorted({file for file in files.values() if not (index.parent / file).is_file()})
    if missing:
        raise UserError(f"{index.parent} lacks {len(missing)} of the shards that its index names: {first_few(missing)}")
    shards = {file: read_header(index.parent / file) for file in sorted(set(files.values()))}
    absent = [f"{name} in {file}" for name, file in files.items() if name not in shards[file]]
    if absent:
        raise UserError(f"{index} names {len(absent)} tensors that do not exist: {first_few(absent)}")
    extra = [f"{name} in {file}" for file, shard in shards.items() for name in shard if files.get(name) != file]
    if extra:
        raise UserError(f"{index} does not name {len(extra)} tensors of its shards: {first_few(extra)}")
    return {name: shards[file][name] for name, file in files.items()}
