"""A cache of text embeddings: what the encoders of a model make of a list of prompts.

It is for machines that the encoders do not fit on; where they do, encoding on the fly costs less than a hundredth of
a training step, and no disk. FLUX.1's embeddings of one prompt are 4.2 MB in bfloat16, because its transformer reads
T5's states at the padding, too; Qwen-Image's are 3.7 MB, of prompts of all lengths alike.

    DIR/embeddings.json             format, fingerprint of encoders and tokenizers, dtype, number of prompts, prompts a
                                    shard, SHA-256 of the list of prompts
    DIR/shard-00000.safetensors     of up to `SHARD` prompts:
        text, pooled, …             what the encoders gave, [prompts, ...], in the dtype that the recipe computes in
        cut                         which prompts had more tokens than the encoder takes, [prompts] bool
        prompts, prompt_ends        the prompts in UTF-8, one after the other, uint8, and where each ends, int64

The arrays are stored as the encoders gave them: a cache is as good as encoding on the fly, and one of another dtype
than the recipe's is refused rather than rounded.
"""

# B prompts of a batch, P prompts of a shard

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from arcflow_jax.errors import UserError
from arcflow_jax.storage.files import read_json
from arcflow_jax.storage.safetensors import FileTensor, read_header

DESCRIPTION = "embeddings.json"
FORMAT = "arcflow_jax embeddings"
VERSION = 1
SHARD = 256  # prompts: a gigabyte of FLUX.1's or Qwen-Image's embeddings
# What a shard has beside the encoders' arrays
OWN = ("cut", "prompts", "prompt_ends")


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def write_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_bytes(save(arrays))  # its save_file tells of a full disk in an error of its own
    os.replace(aside, path)


def read_description(folder: Path) -> dict[str, Any]:
    """What embeddings.json says. Raises UserError if there is no finished cache of this version."""
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} holds no embeddings: it has no {DESCRIPTION}; arcflow embed-prompts writes one")
    description = read_json(folder / DESCRIPTION)
    if (description.get("format"), description.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{folder / DESCRIPTION} is not of {FORMAT} version {VERSION}")
    return description


def read_shard(path: Path) -> tuple[dict[str, FileTensor | np.ndarray], list[str]]:
    """The arrays of a shard, the encoders' left on disk, and its prompts. Raises UserError if it is damaged."""
    tensors = read_header(path)
    if missing := sorted(set(OWN) - tensors.keys()):
        raise UserError(f"{path} is not a shard of embeddings: it lacks {', '.join(missing)}")
    text, ends = (np.asarray(tensors.pop(name)) for name in ("prompts", "prompt_ends"))
    texts = [text[first:last].tobytes().decode() for first, last in itertools.pairwise([0, *ends])]
    return tensors | {"cut": np.asarray(tensors["cut"])}, texts
