"""Prompts to token ids, with the tokenizers in a model's folder (`tokenizer/`, `tokenizer_2/`).

The ids are the same as in diffusers' pipelines: cut and padded at the end to a fixed length.
"""

# B prompts, N tokens

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from msgspec import Meta

from arcflow_jax import schema
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.storage.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, of the class in its tokenizer_config.json. Nothing is downloaded.

    Raises:
      UserError: if the folder is missing or does not hold a complete tokenizer.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # without PyTorch it prints a warning
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder} holds no tokenizer: tokenizer_config.json is missing")
    if not any((folder / name).is_file() for name in VOCABULARIES):  # transformers would make an empty one
        raise UserError(f"{folder} holds no vocabulary: it needs one of {', '.join(VOCABULARIES)}")
    try:
        name = read_json(folder / "tokenizer_config.json").get("tokenizer_class")
        tokenizer = tokenizer_class(name).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises all kinds, down to the bare Exception of its Rust part
        raise UserError(f"{folder} does not hold a tokenizer that transformers can load: {one_line(error)}") from error
    if tokenizer.pad_token_id is None:
        raise UserError(f"{folder} names no pad_token")
    return tokenizer


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The part of a tokenizer_config.json that is read here. Tokenizers without a maximum have 1e30."""

    model_max_length: Annotated[float, Meta(ge=1, le=1e31)] = 1e30


def tokenizer_class(name: Any) -> Any:
    """A tokenizer class of transformers by its name; `AutoTokenizer`, which imports far more (PyTorch, if there is
    one), for a name that is none."""
    import transformers  # slow to import, and only prompts need it

    known = isinstance(name, str) and name.endswith(("Tokenizer", "TokenizerFast"))
    found = getattr(transformers, name, None) if known else None
    return transformers.AutoTokenizer if found is None else found


def max_length(folder: Path, most: int) -> int:
    """`token_length` of the tokenizer in a folder, from its config alone. Raises UserError if that is missing."""
    file = folder / "tokenizer_config.json"
    return int(min(schema.parse(TokenizerConfig, read_json(file), file).model_max_length, most))


def token_length(tokenizer: PreTrainedTokenizerBase, most: int = 512) -> int:
    """The number of tokens that prompts are padded to: the tokenizer's own maximum, but at most `most`."""
    return min(tokenizer.model_max_length, most)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:  # [B, N = length] int32, [B] bool
    """The prompts' ids, cut and padded to `length`, special tokens included, and which prompts were cut."""
    whole = tokenizer(list(prompts), verbose=False).input_ids
    options = {"padding": "max_length", "padding_side": "right", "max_length": length, "truncation": True}
    cut = tokenizer(list(prompts), **options).input_ids
    return np.array(cut, np.int32).reshape(-1, length), np.array([len(ids) > length for ids in whole], bool)
