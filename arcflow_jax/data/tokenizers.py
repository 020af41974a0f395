"""Prompts to token ids, with the tokenizers in a model's folder (`tokenizer/`, `tokenizer_2/`).

The ids are the same as in diffusers' pipelines: cut and padded at the end to a fixed length. A folder's tokenizer.json
is read by the tokenizers library alone. Only a folder without one needs transformers. No code from a folder ever runs.
"""

# B prompts, N tokens

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from arcflow_jax.errors import UserError, one_line
from arcflow_jax.storage.files import read_json
from arcflow_jax.storage.paths import in_bucket, local_copy

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
# All that a converted model keeps of a tokenizer's folder
FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", *VOCABULARIES, "merges.txt"),
    *("chat_template.json", "chat_template.jinja"),
)
MOST_BYTES = 2**27  # of one of them: the largest known ones have 40 MB
# transformers' own, where a folder names none
PAD_TOKENS = {"CLIPTokenizer": "<|endoftext|>", "T5Tokenizer": "<pad>", "Qwen2Tokenizer": "<|endoftext|>"}
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that neither cuts nor pads, with what is needed for both.

    Attributes:
      backend: of the tokenizers library.
      pad_token_id: what shorter prompts are filled up with.
      model_max_length: the most tokens that the encoder takes, special tokens included; huge if the folder says none.
    """

    backend: Backend
    pad_token_id: int
    model_max_length: int


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder. Nothing is downloaded.

    Raises:
      UserError: if the folder is missing or does not hold a complete tokenizer.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder} holds no tokenizer: tokenizer_config.json is missing")
    if not any((folder / name).is_file() for name in VOCABULARIES):  # transformers would make an empty one
        raise UserError(f"{folder} holds no vocabulary: it needs one of {', '.join(VOCABULARIES)}")
    config = read_json(folder / "tokenizer_config.json")
    class_name = str(config.get("tokenizer_class")).removesuffix("Fast")
    whole = (folder / "tokenizer.json").is_file()
    try:
        backend = (
            Backend.from_str((folder / "tokenizer.json").read_text("utf-8"))
            if whole
            else from_vocabulary(folder, class_name)
        )
        special = special_tokens(folder, config)
        add_missing(backend, config, special.values())
        backend.no_truncation()
        backend.no_padding()
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the Rust part raises the bare Exception, and a panic is not even one
        library = "tokenizers" if whole else "transformers"
        raise UserError(f"{folder} does not hold a tokenizer that {library} can load: {one_line(error)}") from error
    pad = special.get("pad_token", PAD_TOKENS.get(class_name))
    if pad is None:
        raise UserError(f"{folder} names no pad_token")
    if (pad_id := backend.token_to_id(pad)) is None:
        raise UserError(f"{folder} names pad_token {one_line(repr(pad))}, which its vocabulary lacks")
    return Tokenizer(backend, pad_id, most_tokens(config, folder))


def from_vocabulary(folder: Path, class_name: str) -> Backend:
    """The tokenizer in a folder without tokenizer.json: transformers' class knows the rest. Raises all kinds."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # without PyTorch it prints a warning
    import transformers  # takes a second

    found = getattr(transformers, class_name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase)):
        raise UserError(
            f"{folder} has no tokenizer.json, and its tokenizer_class {one_line(repr(class_name))} is none that "
            f"transformers has: it would be one of {', '.join(PAD_TOKENS)}"
        )
    with local_copy(folder) as local:
        return found.from_pretrained(local, local_files_only=True, trust_remote_code=False).backend_tokenizer


def special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The special tokens that a folder names, by their names."""
    named = folder / "special_tokens_map.json"
    values = (read_json(named) if named.is_file() else {}) | {name: x for name, x in config.items() if x is not None}
    tokens = {name: values[name] for name in SPECIAL_TOKENS if values.get(name) is not None}
    # Written as a text, or as an object with its settings
    return {name: str(x["content"] if isinstance(x, dict) else x) for name, x in tokens.items()}


def add_missing(backend: Backend, config: dict[str, Any], special: Any) -> None:
    """Makes a tokenizer find special and added tokens in a prompt that only tokenizer_config.json names as such."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for _, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if token["content"] not in known:
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            backend.add_tokens([AddedToken(token["content"], **{name: token[name] for name in flags if name in token})])
            known.add(token["content"])
    backend.add_special_tokens([x for x in special if x not in known and backend.token_to_id(x) is not None])


def most_tokens(config: dict[str, Any], folder: Path) -> int:
    """model_max_length of a tokenizer_config.json. Raises UserError if it is not a positive number."""
    value = config.get("model_max_length", 10**30)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
        raise UserError(f"{folder}: model_max_length is {one_line(repr(value))}, but has to be a positive number")
    return int(min(value, 10**30))


def max_length(folder: Path, most: int) -> int:
    """`token_length` of the tokenizer in a folder, from its config alone. Raises UserError if that is missing."""
    return min(most_tokens(read_json(folder / "tokenizer_config.json"), folder), most)


def token_length(tokenizer: Tokenizer, most: int = 512) -> int:
    """The number of tokens that prompts are padded to: the tokenizer's own maximum, but at most `most`."""
    return min(tokenizer.model_max_length, most)


def tokenize(
    tokenizer: Tokenizer, prompts: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:  # [B, N = length] int32, [B] bool
    """The prompts' ids, cut and padded to `length`, special tokens included, and which prompts were cut."""
    whole = [encoding.ids for encoding in tokenizer.backend.encode_batch(list(prompts))]
    tokenizer.backend.enable_truncation(length)  # which keeps the special tokens
    cut = [encoding.ids for encoding in tokenizer.backend.encode_batch(list(prompts))]
    tokenizer.backend.no_truncation()
    ids = np.full((len(cut), length), tokenizer.pad_token_id, np.int32)
    for row, found in zip(ids, cut, strict=True):
        row[: len(found)] = found
    return ids, np.array([len(ids) > length for ids in whole], bool)


def copy_tokenizer(folder: Path, out: Path, model: Path) -> None:
    """Copies what a tokenizer needs (`FILES`), and nothing else, from a folder of `model` to the new folder `out`.

    A link is followed only inside `model`, or to the blobs of the hub's cache that `model` is a snapshot in. Another
    one could lead to any file of the user's, which would then be published with the model.

    Raises:
      UserError: if a file is such a link, or is not a regular file of at most `MOST_BYTES`, or cannot be read.
      OSError: if it cannot be written.
    """
    out.mkdir()
    root = model.resolve()
    allowed = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    for file in (folder / name for name in FILES):
        if not (file.exists() or file.is_symlink()):
            continue
        target = file if in_bucket(file) else Path(os.path.realpath(file))
        if not any(target.is_relative_to(place) for place in allowed):
            raise UserError(f"{file} leads to {target}, outside of {model}: copy the file there")
        if not target.is_file():
            raise UserError(f"{file} is not a regular file")
        if target.stat().st_size > MOST_BYTES:
            raise UserError(f"{file} has more than {MOST_BYTES} bytes, which no tokenizer's file has")
        try:
            content = target.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from error
        (out / file.name).write_bytes(content)
