"""The files of a cache of text embeddings: the outputs of a model's text encoders for a list of prompts.

The cache is for machines on which the encoders do not fit. Where they fit, encoding on the fly costs less than a
hundredth of a training step, and no disk. FLUX.1's embeddings of one prompt take 4.2 MB in bfloat16, because its
transformer also reads T5's states of the padding. Qwen-Image's take 3.7 MB, whatever the prompt's length.

    DIR/embeddings.json             format, fingerprint of encoders and tokenizers, dtype, number of prompts, prompts
                                    per shard, SHA-256 of the list of prompts
    DIR/shard-00000.safetensors     up to `SHARD` prompts:
        text, pooled, …             the encoders' outputs, [prompts, ...], in the recipe's dtype
        cut                         which prompts were too long for the encoder and were cut, [prompts] bool
        prompts, prompt_ends        the prompts in UTF-8, one after the other, uint8, and where each ends, int64

The outputs are stored unchanged, so a cache gives the same result as encoding on the fly. A cache of another dtype than
the recipe's is refused, not rounded.
"""

# B prompts of a batch, P prompts of a shard

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from arcflow_jax.errors import UserError
from arcflow_jax.schema import SHA256, Count, Precision
from arcflow_jax.storage.atomic import whole_file
from arcflow_jax.storage.files import read_own
from arcflow_jax.storage.safetensors import FileTensor, read_header

DESCRIPTION = "embeddings.json"
FORMAT = "arcflow_jax embeddings"
VERSION = 1
SHARD = 256  # prompts: about a gigabyte of FLUX.1's or Qwen-Image's embeddings
# The arrays of a shard that are not the encoders'
OWN = ("cut", "prompts", "prompt_ends")


def shard_path(folder: Path, index: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{index:05d}.safetensors"


def write_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays of a shard, complete or not at all. Raises OSError."""
    with whole_file(path) as aside:
        aside.write_bytes(save(arrays))  # safetensors' save_file has an error of its own for a full disk


@dataclasses.dataclass(frozen=True)
class CacheDescription:
    """The content of embeddings.json.

    Attributes:
      encoders: fingerprint of encoders and tokenizers.
      dtype: of the embeddings.
      prompts: their number.
      shard: the number of prompts of a shard.
      list: SHA-256 of the list of prompts.
    """

    encoders: SHA256
    dtype: Precision
    prompts: Count
    shard: Count
    list: SHA256


def read_description(folder: Path) -> CacheDescription:
    """The content of embeddings.json. Raises UserError if there is no finished cache of this version."""
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} holds no embeddings: it has no {DESCRIPTION}; arcflow embed-prompts writes one")
    return read_own(CacheDescription, folder / DESCRIPTION, FORMAT, VERSION)


def read_shard(path: Path) -> tuple[dict[str, FileTensor | np.ndarray], list[str]]:
    """A shard's arrays, with the encoders' outputs still on disk, and its prompts. Raises UserError if damaged."""
    tensors = read_header(path)
    if missing := sorted(set(OWN) - tensors.keys()):
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
    return tensors | {"cut": np.asarray(tensors["cut"])}, texts
