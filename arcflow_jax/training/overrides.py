"""Values for the fields of nested dataclasses, by dotted name: checked against the fields' types, or read from text."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from arcflow_jax import schema
from arcflow_jax.errors import UserError, one_line


def kind_of(cls: type, key: str) -> Any:
    """The type of a field by its dotted name, e.g. "adapter.rank". Raises UserError, naming the known ones."""
    kind: Any = cls
    seen: list[str] = []
    for name in key.split("."):
        fields = schema.types_of(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in fields:
            where = ".".join(seen) or "a recipe"
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {'.'.join([*seen, *near])}? " if near else ""
            raise UserError(
                f"{where} has no key '{one_line(name)}': {hint}known are {', '.join(fields) or 'none below it'}"
            )
        kind = fields[name]
        seen.append(name)
    return kind


def flatten(cls: type, values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of a nested mapping, down to the fields of `cls` that are no dataclasses."""
    for name, value in values.items():
        if isinstance(value, Mapping) and dataclasses.is_dataclass(kind_of(cls, prefix + name)):
            yield from flatten(cls, value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def checked(cls: type, key: str, value: Any) -> Any:
    """`value` as the field `key` of `cls` has it: lists become tuples, whole numbers floats. Raises UserError."""
    kind = kind_of(cls, key)
    if dataclasses.is_dataclass(kind):
        names = ", ".join(f"--config.{key}.{field.name}" for field in dataclasses.fields(kind))
        raise UserError(f"--config.{key} is {schema.shown(value)}, but it is a group of keys: set one of {names}")
    return schema.converted(kind, value, f"--config.{key}")


def parsed(cls: type, key: str, text: str) -> Any:
    """The value of the field `key` of `cls` from a command line: a text as it stands, others in Python's notation."""
    kind = kind_of(cls, key)
    if kind is str or typing.get_origin(kind) is typing.Literal:
        return checked(cls, key, text)
    try:
        value = ast.literal_eval(text.capitalize() if kind is bool else text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    return checked(cls, key, value)
