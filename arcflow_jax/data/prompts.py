"""Reads prompts: .txt, .jsonl and .parquet files, folders of them, data sets on the Hugging Face hub.

They are read once, in order, into one list. Ten million prompts of a hundred letters take two gigabytes.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from arcflow_jax import schema
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.storage.files import file_size, json_records, read_lines
from arcflow_jax.storage.hub import PREFIX, is_repository, not_found
from arcflow_jax.storage.paths import as_path

# Sets known by name, which few-step generators are compared on, where the authors of pi-Flow and ArcFlow read them
NAMED = {
    "hpsv2": "Lakonik/t2i-prompts-hpsv2:test",  # 3,200 prompts in four styles, of the human preference score
    "coco-10k": "Lakonik/t2i-prompts-coco-10k:test",  # 10,000 captions of COCO
}
SIZE = ("height", "width")  # fields, or columns, that give the image size of each prompt


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a source.

    Attributes:
      source: where they were read.
      texts: the prompts, in the source's order, without white space at their ends.
      empty: how many prompts were empty. `texts` does not contain them.
      sizes: (height, width) in pixels of each prompt's image, if the source gives them.
    """

    source: str
    texts: list[str]
    empty: int
    sizes: list[tuple[int, int]] | None = None

    def __str__(self) -> str:
        left_out = f", {self.empty} empty ones left out" if self.empty else ""
        sized = ", each with height and width" if self.sizes else ""
        return f"{len(self.texts)} prompts from {self.source}{sized}{left_out}"

    def first(self, count: int | None) -> Prompts:
        """The first `count` prompts, all if it is None. Raises UserError if there are not so many."""
        if count is None:
            return self
        if not 1 <= count <= len(self.texts):
            has = len(self.texts)
            raise UserError(f"count is {count}, but has to be from 1 to {has}, the prompts that {self.source} has")
        return dataclasses.replace(self, texts=self.texts[:count], sizes=self.sizes and self.sizes[:count])


class Row(NamedTuple):
    """One prompt of a source, which may be empty or None, the size of its image if given, and where it was read."""

    text: str | None
    size: tuple[int, int] | None
    where: str


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises UserError if there is no prompt, an empty one, or one that is not text."""
    for prompt in prompts:
        schema.converted(str, prompt, "prompt")
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty: say in words what the image should show")


def read_prompts(source: str | Path, field: str = "prompt") -> Prompts:
    """The prompts of a file, of all files in a folder, or of a data set on the hub.

    Args:
      source: a .txt file with one prompt per line; a .jsonl or .parquet file; a folder, in which all such files are
        read in the order of their paths, subfolders included; a hub id, OWNER/NAME or OWNER/NAME:SPLIT (see
        `hub.split_folder`), with `train` as the default split; or the name of a set in `NAMED`.
      field: the field or column with the prompt; a text file has none. Where there are also fields or columns `height`
        and `width`, they give the size of each prompt's image in pixels.

    Raises:
      UserError: if the source is missing, damaged, of an unknown kind, without the field or without any prompt; if
        a line is broken; if only some prompts have a height and width; if a library that the kind needs is missing,
        or the download fails.
    """
    texts, sizes, empty, sized = [], [], 0, None
    for text, size, where in rows(str(source), field):
        sized = size is not None if sized is None else sized
        if sized != (size is not None):
            has = "has no height and width, but" if sized else "has a height and width, but not"
            raise UserError(f"{where} {has} the prompts before it: either all prompts have them, or none")
        if text := (text or "").strip():
            texts.append(text)
            sizes.append(size)
        else:
            empty += 1
    if not texts:
        raise UserError(f"{source} holds no prompts" + (f", only {empty} empty ones" if empty else ""))
    return Prompts(str(source), texts, empty, sizes if sized else None)


def rows(source: str, field: str) -> Iterator[Row]:
    """The prompts of a source, empty ones included. Raises UserError as `read_prompts`."""
    path = as_path(source)
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
    elif is_repository(split_name(source)[0]):
        yield from read_hub(source, field)
    else:
        raise UserError(
            f"cannot read prompts: {not_found(split_name(source)[0])}; sets known by name are {' and '.join(NAMED)}"
        )


def split_name(source: str) -> tuple[str, str]:
    """The hub id, with its prefix if it has one, and the split of OWNER/NAME:SPLIT; the default split is `train`."""
    prefix = PREFIX if source.startswith(PREFIX) else ""
    name, _, split = source.removeprefix(prefix).partition(":")
    return prefix + name, split or "train"


def hidden(file: Path, folder: Path) -> bool:
    """Whether a file in a folder, or a subfolder on the way to it, is hidden, as in the hub's own cache."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def read_file(path: Path, field: str) -> Iterator[Row]:
    """The prompts of one file. Raises UserError as `read_prompts`."""
    try:
        yield from READERS[path.suffix](path, field)
    except OSError as error:
        raise UserError(f"cannot read prompts from {path}: {error.strerror or one_line(error)}") from None


def read_text(path: Path, field: str) -> Iterator[Row]:
    """One prompt per line."""
    for where, line in read_lines(path):
        try:
            yield Row(line.decode(), None, where)
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not text in UTF-8: {error.reason}") from None


def read_json_lines(path: Path, field: str) -> Iterator[Row]:
    """One JSON object per line, with the prompt in a field."""
    for where, record in json_records(path):
        yield Row(text_of(where, record, field), size_of(where, record), where)


def text_of(where: str, record: dict[str, Any], field: str) -> str | None:
    """A text field of a JSON object. Raises UserError, naming `where`, if it is missing or not a text."""
    check_field(where, "field", field, record)
    value = record[field]
    if not isinstance(value, str | None):
        raise UserError(f"{where}: {field} is not a text but {schema.shown(value)}")
    return value


def size_of(where: str, record: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width of a JSON object or row; None if it has neither. Raises UserError if it has one, or on a value
    that is not a whole number above 0."""
    values = [record.get(name) for name in SIZE]
    if values == [None, None]:
        return None
    for name, other, value in zip(SIZE, SIZE[::-1], values, strict=True):
        if value is None:
            raise UserError(f"{where} has a {other} but no {name}: a prompt has both or neither")
        schema.converted(schema.Pixels, value, f"{where}: {name}")
    return tuple(values)


def read_parquet(path: Path, field: str) -> Iterator[Row]:
    """The columns that are needed, a part of the file at a time."""
    file_size(path)
    pa, parquet = library("pyarrow", "Parquet files"), library("pyarrow.parquet", "Parquet files")
    try:
        # Opened here, because of a path in a bucket pyarrow would ask a client of its own
        with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
            check_field(str(path), "column", field, file.schema_arrow.names)
            kind = file.schema_arrow.field(field).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
                raise UserError(f"{path}: column {field} is not of texts but of {kind}")
            columns = [field, *(name for name in SIZE if name in file.schema_arrow.names)]
            batches = (batch.to_pylist() for batch in file.iter_batches(columns=columns))
            yield from table_rows(str(path), field, batches)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged, or not a Parquet file: {one_line(error)}") from None


def table_rows(source: str, field: str, batches: Iterable[Sequence[dict[str, Any]]]) -> Iterator[Row]:
    """The prompts of a table, which comes in batches of rows: column → value."""
    number = 0
    for batch in batches:
        for record in batch:
            number += 1
            where = f"{source}, row {number}"
            yield Row(record[field], size_of(where, record), where)


def read_hub(source: str, field: str) -> Iterator[Row]:
    """A split of a data set on the hub, which the library `datasets` downloads and keeps in its cache."""
    datasets = library("datasets", "data sets of the hub")
    name, split = split_name(source)
    try:
        dataset = datasets.load_dataset(name.removeprefix(PREFIX), split=split)
    except datasets.exceptions.DatasetNotFoundError as error:  # missing, private or gated: its message says which
        raise UserError(
            f"there is no file or folder {source}, and the hub shows no such data set: {one_line(error)} If it is "
            "private or gated, log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except Exception as error:  # no network, no such split, several configurations, a full disk
        raise UserError(f"cannot read data set {source}: {one_line(error)}") from error
    check_field(source, "column", field, dataset.column_names)
    if getattr(dataset.features[field], "dtype", None) not in ("string", "large_string", "null"):
        raise UserError(f"{source}: column {field} is not of texts but of {one_line(dataset.features[field])}")
    columns = [field, *(name for name in SIZE if name in dataset.column_names)]
    batches = (batch.to_pylist() for batch in dataset.select_columns(columns).with_format("arrow").iter(10_000))
    yield from table_rows(source, field, batches)


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".txt": read_text,
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
}


def check_field(where: str, kind: str, field: str, there: Any) -> None:
    """Raises UserError unless `field` is one of the names in `there`."""
    if field not in there:
        names = one_line(", ".join(map(str, there))) or "none at all"
        raise UserError(f"{where} has no {kind} {schema.shown(field)}, only {names}: name the one that has the prompt")


def library(name: str, purpose: str, extra: str = "data") -> ModuleType:
    """An optional library, which the extra `extra` installs. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"{purpose} need {package}: pip install {package}, or arcflow_jax[{extra}]") from None
