"""JSON files, digests, and config dataclasses read from a config.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from arcflow_jax.errors import UserError, one_line
from arcflow_jax.storage.atomic import whole_file

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file is missing or is not a JSON object."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any] | list[Any]) -> None:
    """Writes a JSON file, which appears complete or not at all. Raises OSError."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n")


def digest(values: Iterable[Any]) -> str:
    """SHA-256 of a list, written as JSON."""
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with its own SHA-256 as `sha256`, which `check_seal` compares."""
    return value | {"sha256": seal_of(value)}


def check_seal(value: dict[str, Any], where: object) -> None:
    """Raises UserError if a JSON object that `sealed` made was changed since."""
    if value.get("sha256") != seal_of(value):
        raise UserError(f"{where} is damaged, or was changed by hand: its sha256 is not that of its content")


def seal_of(value: dict[str, Any]) -> str:
    """SHA-256 of a JSON object without its `sha256`, whatever the order of its names."""
    rest = {name: x for name, x in value.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_config(cls: type[T], config: Any, where: str) -> T:
    """A `cls`, a dataclass, filled from those keys of `config` that are its fields. Other keys are ignored.

    A field that is a dataclass itself is filled from a nested object. A dataclass may list in `REQUIRED`, name → value,
    the settings that its network has built in: a checkpoint with another value is of another architecture, and is
    refused instead of computed wrongly. It may have a function `flat` that moves nested settings of a config.json to
    the top level.

    Raises:
      UserError: naming `where`, if `config` is not a dict, a field without a default is absent or has the wrong type,
        or a `REQUIRED` setting differs.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where} is {one_line(config)}, but has to be a JSON object")
    config = getattr(cls, "flat", dict)(config)
    for name, value in getattr(cls, "REQUIRED", {}).items():
        if name in config and config[name] != value:
            raise UserError(f"{where}: {name} is {config[name]!r}, only {value!r} is supported")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    optional = {
        name
        for name, field in fields.items()
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    }
    values = {name: config[name] for name in fields if config.get(name) is not None}
    if missing := sorted(fields.keys() - optional - values.keys()):
        raise UserError(f"{where}: missing {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            values[name] = parse_config(hints[name], value, f"{where}, {name}")
        elif not fits(value, hints[name]):
            raise UserError(f"{where}: {name} is {one_line(repr(value))}, but has to be {describe(hints[name])}")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value has the type of a field: bool, int, float, str, tuples and unions of them, or Any."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(fits(value, part) for part in parts)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            return False
        if parts[-1] is Ellipsis:
            parts = parts[:1] * len(value)
        return len(parts) == len(value) and all(map(fits, value, parts))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if typing.get_origin(hint) is typing.Literal:
        return value in parts
    kind = typing.get_origin(hint) or hint
    return kind is Any or isinstance(value, kind)


def describe(hint: Any) -> str:
    """A field's type, in an error message."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(describe(part) for part in parts if part is not type(None))
    if typing.get_origin(hint) is tuple:
        count = "" if parts[-1] is Ellipsis else f" of {len(parts)}"
        return f"a list{count}, each {describe(parts[0])}"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, parts))
    return names.get(hint, "a JSON object" if typing.get_origin(hint) is dict else str(hint))
