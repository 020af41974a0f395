"""Where prompts come from: .txt, .jsonl and .parquet files, folders of them, data sets of the Hugging Face hub.

They are read once, in order, into one list: ten million prompts of a hundred letters are two gigabytes.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from arcflow_jax.errors import UserError, one_line
from arcflow_jax.storage.hub import is_repository

# The sets that few-step generators are compared on, as the authors of pi-Flow and ArcFlow read them from the hub
NAMED = {
    "hpsv2": "Lakonik/t2i-prompts-hpsv2:test",  # 3,200 prompts in four styles, of the human preference score
    "coco-10k": "Lakonik/t2i-prompts-coco-10k:test",  # 10,000 captions of COCO
}


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What `read_prompts` found.

    Attributes:
      source: where.
      texts: the prompts, in the source's order, without white space at their ends.
      empty: how many were empty, and are not among them.
      sizes: (height, width) in pixels of each prompt's image, if the source has such columns.
    """

    source: str
    texts: list[str]
    empty: int
    sizes: list[tuple[int, int]] | None = None

    def __str__(self) -> str:
        left_out = f", {self.empty} empty ones left out" if self.empty else ""
        return f"{len(self.texts)} prompts from {self.source}{left_out}"


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises UserError if there is no prompt, or an empty one."""
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty: say in words what the image should show")


def read_prompts(source: str | Path, field: str = "prompt") -> Prompts:
    """The prompts of a file, of all files in a folder, or of a data set on the hub.

    Args:
      source: a .txt file, one prompt a line; a .jsonl or .parquet file; a folder, of which all such files are read
        in the order of their paths, subfolders included; or a hub id, OWNER/NAME or OWNER/NAME:SPLIT, by default
        of the split `train`; or the name of a set, of those in `NAMED`.
      field: the field, or column, that has the prompt; a text file has none.

    Raises:
      UserError: if the source is missing, damaged, of an unknown kind, without the field or without any prompt; if
        a line is broken; if a library that the kind needs is missing, or the hub refuses.
    """
    texts, empty = [], 0
    for value in values(str(source), field):
        if text := (value or "").strip():
            texts.append(text)
        else:
            empty += 1
    if not texts:
        raise UserError(f"{source} holds no prompts" + (f", only {empty} empty ones" if empty else ""))
    return Prompts(str(source), texts, empty)


def values(source: str, field: str) -> Iterator[str | None]:
    """The prompts of a source, empty ones and None included. Raises UserError as `read_prompts` does."""
    path = Path(source)
    if source in NAMED and not path.exists():
        yield from read_hub(NAMED[source], field)
    elif path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix in READERS and file.is_file() and not hidden(file, path)
        ]
        if not files:
            raise UserError(f"{source} holds no prompts: no file in it ends in {', '.join(READERS)}")
        for file in files:
            yield from read_file(file, field)
    elif path.suffix in READERS:
        yield from read_file(path, field)
    elif path.exists():
        raise UserError(f"cannot read prompts from {source}: its name does not end in {', '.join(READERS)}")
    elif is_repository(source.partition(":")[0]):
        yield from read_hub(source, field)
    else:
        raise UserError(
            f"cannot read prompts from {source}: there is no such file or folder, a data set's id is OWNER/NAME, and "
            f"sets known by name are {' and '.join(NAMED)}"
        )


def hidden(file: Path, folder: Path) -> bool:
    """Whether a file in a folder, or a subfolder on the way to it, is hidden, as the hub's own cache is."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def read_file(path: Path, field: str) -> Iterator[str | None]:
    try:
        yield from READERS[path.suffix](path, field)
    except OSError as error:
        raise UserError(f"cannot read prompts from {path}: {error.strerror or one_line(error)}") from None


def read_text(path: Path, field: str) -> Iterator[str | None]:
    """One prompt a line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number} is not text in UTF-8: {error.reason}") from None


def read_json_lines(path: Path, field: str) -> Iterator[str | None]:
    """A field of one JSON object a line."""
    for where, record in json_records(path):
        yield text_of(where, record, field)


def json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where it stands, and the JSON object, of each line of a file; blank lines are none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # of JSON, or of UTF-8
                raise UserError(f"{where} is not valid JSON: {one_line(error)}") from None
            if not isinstance(record, dict):
                raise UserError(f"{where} is not a JSON object")
            yield where, record


def text_of(where: str, record: dict[str, Any], field: str) -> str | None:
    """A field of a JSON object. Raises UserError, saying where, if it is missing or no text."""
    check_field(where, "field", field, record)
    value = record[field]
    if not isinstance(value, str | None):
        raise UserError(f"{where}: {field} is not a text but {one_line(value)}")
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {field} has half a surrogate pair, which is no letter") from None
    return value


def read_parquet(path: Path, field: str) -> Iterator[str | None]:
    """One column, a part of the file at a time."""
    pa, parquet = library("pyarrow", "Parquet files"), library("pyarrow.parquet", "Parquet files")
    try:
        with parquet.ParquetFile(path) as file:
            check_field(str(path), "column", field, file.schema_arrow.names)
            kind = file.schema_arrow.field(field).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
                raise UserError(f"{path}: column {field} is not of texts but of {kind}")
            for batch in file.iter_batches(columns=[field]):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged, or not a Parquet file: {one_line(error)}") from None


def read_hub(source: str, field: str) -> Iterator[str | None]:
    """A split of a data set on the hub, which the library `datasets` fetches and keeps in its cache."""
    datasets = library("datasets", "data sets of the hub")
    name, _, split = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, split=split or "train")
    except datasets.exceptions.DatasetNotFoundError as error:  # missing, private or gated, as its message says
        raise UserError(
            f"there is no file or folder {source}, and the hub shows no such data set: {one_line(error)} If it is "
            "private or gated, log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except Exception as error:  # no network, no such split, several configurations, a full disk
        raise UserError(f"cannot read data set {source}: {one_line(error)}") from error
    check_field(source, "column", field, dataset.column_names)
    if getattr(dataset.features[field], "dtype", None) not in ("string", "large_string", "null"):
        raise UserError(f"{source}: column {field} is not of texts but of {one_line(dataset.features[field])}")
    for batch in dataset.select_columns([field]).iter(batch_size=10_000):
        yield from batch[field]


READERS: dict[str, Callable[[Path, str], Iterator[str | None]]] = {
    ".txt": read_text,
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
}


def check_field(where: str, kind: str, field: str, there: Any) -> None:
    """Raises UserError unless `field` is one of those that are there."""
    if field not in there:
        names = one_line(", ".join(map(str, there))) or "none at all"
        raise UserError(f"{where} has no {kind} {field!r}, only {names}: name the one that has the prompt")


def library(name: str, purpose: str, extra: str = "data") -> ModuleType:
    """A library that only some users need, which an extra installs. Raises UserError if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"{purpose} need {package}: pip install {package}, or arcflow_jax[{extra}]") from None
