"""JSON files, read within limits, and digests."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import msgspec

from arcflow_jax import schema
from arcflow_jax.errors import UserError, of_files, one_line
from arcflow_jax.storage.atomic import write_file
from arcflow_jax.storage.paths import in_bucket

T = TypeVar("T")

SMALL = 16 * 2**20  # bytes of a JSON file; the index of a model's shards has less than one million
LINE = 2**20  # bytes of a line
DEPTH = 64  # objects and lists inside one another


def file_size(path: Path, most: int | None = None) -> int:
    """The bytes of a regular file, which can be opened without waiting, as a pipe cannot.

    Raises:
      UserError: if there is no such file, it is a folder, a pipe or a device, or has more than `most` bytes.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise of_files(f"cannot read {path}", error) from None
    except ValueError as error:  # a NUL in the name
        raise UserError(f"cannot read {path}: {one_line(error)}") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is not a regular file")
    if most is not None and found.st_size > most:
        raise UserError(f"{path} has {found.st_size} bytes, but at most {most} are read of such a file")
    return found.st_size


def read_range(path: Path, start: int, end: int) -> bytes:
    """Some bytes of a file. Raises OSError."""
    if in_bucket(path):
        return path.read_bytes(start, end)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


def is_inside(name: str) -> bool:
    """Whether a path that a file names lies in that file's folder, or below."""
    path = PurePosixPath(name)
    fits = name.isprintable() and all(len(part.encode()) <= 255 for part in path.parts)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and fits


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: if the file is missing, cannot be read, has more than `SMALL` bytes, or is not a JSON object.
    """
    file_size(path, SMALL)
    with cannot_read(path):
        data = path.read_bytes()
    return parse_json(data.removeprefix(codecs.BOM_UTF8), path)


def parse_json(data: bytes | str, where: object) -> dict[str, Any]:
    """The object in a JSON text. Raises UserError, which begins with `where`, if it is none, or too deep."""
    try:
        value = msgspec.json.decode(data)
    except RecursionError:
        raise UserError(f"{where} has more than {DEPTH} objects inside one another") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise UserError(f"{where} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} does not hold a JSON object")
    level: list[Any] = [value]
    for _ in range(DEPTH):
        level = [x for each in level for x in (each.values() if isinstance(each, dict) else each) if is_nested(x)]
    if level:
        raise UserError(f"{where} has more than {DEPTH} objects inside one another")
    return value


def is_nested(value: Any) -> bool:
    """Whether a JSON value holds others."""
    return isinstance(value, dict | list)


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """File and line, for errors, and the text of each line of a file.

    Raises:
      UserError: if the file is missing or cannot be read, or a line has more than `LINE` bytes.
    """
    file_size(path)
    with cannot_read(path), path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE + 1), b""), 1):
            where = f"{path}, line {number}"
            if len(line) > LINE:
                raise UserError(f"{where} has more than {LINE} bytes")
            yield where, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """File and line, and the JSON object, of each line of a file; blank lines are skipped. Raises UserError."""
    for where, line in read_lines(path):
        if line.strip():
            yield where, parse_json(line, where)


@contextlib.contextmanager
def cannot_read(path: Path) -> Iterator[None]:
    """Inside the `with` block, an OSError becomes a UserError that names what could not be read."""
    try:
        yield
    except OSError as error:
        raise of_files(f"cannot read {path}", error) from error


def read_own(cls: type[T], path: Path, name: str, version: int) -> T:
    """A `cls` from a JSON file of ours, which has the name of its format and a version, from 1 to `version`.

    From version 2 on it also has its own SHA-256. A `cls` with a field `version` gets the version.

    Raises:
      UserError: if the file is missing, is not of this format, was changed, or does not fit `cls`.
    """
    values = read_json(path)
    found, number = values.get("format"), values.get("version")
    if found != name or type(number) is not int or not 1 <= number <= version:
        other = f"version {schema.shown(number)}" if found == name else schema.shown(found)
        known = " or ".join(map(str, range(1, version + 1)))
        raise UserError(f"{path} is not of {name} version {known}, but of {other}")
    if number > 1 and values.pop("sha256", None) != seal(values):
        raise UserError(f"{path} is damaged, or was changed by hand: its sha256 is not that of its content")
    del values["format"]
    if "version" not in schema.types_of(cls):
        del values["version"]
    return schema.parse(cls, values, path, own=True)


def write_own(path: Path, value: Any, name: str, version: int) -> None:
    """Writes a dataclass to a JSON file of ours, see `read_own`. Raises OSError."""
    values = {"format": name, "version": version, **schema.unparse(value)}
    write_json(path, values | {"sha256": seal(values)})


def write_json(path: Path, value: dict[str, Any] | list[Any]) -> None:
    """Writes a JSON file, which appears complete or not at all. Raises OSError."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def digest(values: Iterable[Any]) -> str:
    """SHA-256 of a list, written as JSON."""
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()


def seal(values: dict[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
