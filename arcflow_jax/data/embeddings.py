"""The files of a cache of text embeddings: the outputs of a model's text encoders for a list of prompts.

The cache is for machines on which the encoders do not fit. Where they fit, encoding on the fly costs less than a
hundredth of a training step, and no disk. FLUX.1's embeddings of one prompt take 4.2 MB in bfloat16, because its
transformer also reads T5's states of the padding. Qwen-Image's take 3.7 MB, whatever the prompt's length.

    DIR/embeddings.json             format, fingerprint of encoders and tokenizers, dtype, number of prompts, prompts
                                    per shard, SHA-256 of the list of prompts, and of embeddings.json itself
    DIR/shard-00000.safetensors     up to `SHARD` prompts:
        text, pooled, …             the encoders' outputs, [prompts, ...], in the recipe's dtype
        cut                         which prompts were too long for the encoder and were cut, [prompts] bool
        checksums                   CRC-32 of each prompt's row in the arrays above, [prompts] int64
        prompts, prompt_ends        the prompts in UTF-8, one after the other, uint8, and where each ends, int64

The outputs are stored unchanged, so a cache gives the same result as encoding on the fly. A cache of another dtype than
the recipe's is refused, not rounded.
"""

# B prompts of a batch, P prompts of a shard

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from arcflow_jax.errors import UserError
from arcflow_jax.schema import SHA256, Count, Precision
from arcflow_jax.storage.files import digest, read_own
from arcflow_jax.storage.safetensors import FileTensor, read_header, write_tensors

DESCRIPTION = "embeddings.json"
FORMAT = "arcflow_jax embeddings"
VERSION = 2
SHARD = 256  # prompts: about a gigabyte of FLUX.1's or Qwen-Image's embeddings
# The arrays of a shard that are not the encoders'
OWN = ("cut", "checksums", "prompts", "prompt_ends")


def shard_path(folder: Path, index: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{index:05d}.safetensors"


def write_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays of a shard and their checksums, complete or not at all. Raises OSError."""
    rows = range(len(arrays["cut"]))
    write_tensors(path, arrays | {"checksums": np.array([row_checksum(read_row(arrays, i)) for i in rows], np.int64)})


def read_row(arrays: Mapping[str, FileTensor | np.ndarray], row: int) -> dict[str, np.ndarray]:
    """One prompt's row, [1, ...], of `cut` and of the encoders' outputs."""
    names = arrays.keys() - set(OWN) | {"cut"}
    return {name: np.asarray(arrays[name][row : row + 1]) for name in sorted(names)}


def row_checksum(arrays: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of a row: of the arrays' names, dtypes, shapes and bytes, in the order of their names."""
    checksum = 0
    for name, array in sorted(arrays.items()):
        checksum = zlib.crc32(f"{name} {array.dtype.name} {array.shape}".encode(), checksum)
        checksum = zlib.crc32(np.ascontiguousarray(array).view(np.uint8), checksum)
    return checksum


def checked_row(arrays: Mapping[str, FileTensor | np.ndarray], row: int, path: Path) -> dict[str, np.ndarray]:
    """`read_row` of the shard `path`. Raises UserError if its checksum is wrong; older shards have none."""
    found = read_row(arrays, row)
    if "checksums" in arrays and row_checksum(found) != arrays["checksums"][row]:
        raise UserError(f"{path} is damaged: the checksum of prompt {row} is wrong; remove the cache and embed again")
    return found


@dataclasses.dataclass(frozen=True)
class CacheDescription:
    """The content of embeddings.json.

    Attributes:
      encoders: fingerprint of encoders and tokenizers.
      dtype: of the embeddings.
      prompts: their number.
      shard: the number of prompts of a shard.
      list: SHA-256 of the list of prompts.
      version: of the format.
    """

    encoders: SHA256
    dtype: Precision
    prompts: Count
    shard: Count
    list: SHA256
    version: Literal[1, 2] = VERSION


def read_description(folder: Path) -> CacheDescription:
    """The content of embeddings.json. Raises UserError if there is no finished cache of this version."""
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} holds no embeddings: it has no {DESCRIPTION}; arcflow embed-prompts writes one")
    return read_own(CacheDescription, folder / DESCRIPTION, FORMAT, VERSION)


def read_cache(folder: Path) -> tuple[CacheDescription, list[dict[str, FileTensor | np.ndarray]], list[str]]:
    """Description, shards and prompts of a cache; the encoders' outputs are still on disk. Raises UserError."""
    description = read_description(folder)
    shards, prompts = [], []
    for i in range(-(-description.prompts // description.shard)):
        path = shard_path(folder, i)
        shard, texts = read_shard(path, description.version)
        if len(texts) != (expected := min(description.shard, description.prompts - len(prompts))):
            raise UserError(f"{path} is damaged: it has {len(texts)} prompts, but {DESCRIPTION} says {expected}")
        shards.append(shard)
        prompts += texts
    if digest(prompts) != description.list:
        raise UserError(f"{folder} is damaged: its prompts are not those that it was made of; embed them again")
    return description, shards, prompts


def read_shard(path: Path, version: int = VERSION) -> tuple[dict[str, FileTensor | np.ndarray], list[str]]:
    """A shard's arrays, with the encoders' outputs still on disk, and its prompts. Raises UserError if damaged."""
    tensors = read_header(path)
    if missing := sorted(set(OWN) - ({"checksums"} if version == 1 else set()) - tensors.keys()):
        raise UserError(f"{path} is not a shard of embeddings: it lacks {', '.join(missing)}")
    text, ends = (np.asarray(tensors.pop(name)) for name in ("prompts", "prompt_ends"))
    if text.dtype != np.uint8 or ends.dtype != np.int64 or (text.ndim, ends.ndim) != (1, 1):
        raise UserError(f"{path} is damaged: its prompts have another dtype or shape than those of a shard")
    bounds = [0, *ends.tolist()]
    if sorted(bounds) != bounds or bounds[-1] != len(text) or {x.shape[:1] for x in tensors.values()} != {ends.shape}:
        raise UserError(f"{path} is damaged: its arrays are not of the same number of prompts")
    try:
        texts = [text[first:last].tobytes().decode() for first, last in itertools.pairwise(bounds)]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: a prompt is not text in UTF-8: {error.reason}") from None
    return {name: np.asarray(x) if name in OWN else x for name, x in tensors.items()}, texts
