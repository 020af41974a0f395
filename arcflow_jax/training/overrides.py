"""Values for the fields of nested dataclasses, by dotted name: checked against the fields' types, or read from text."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from arcflow_jax.errors import UserError

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}


def kind_of(cls: type, key: str) -> Any:
    """The type of a field by its dotted name, e.g. "adapter.rank". Raises UserError, naming the known ones."""
    kind: Any = cls
    seen: list[str] = []
    for name in key.split("."):
        fields = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in fields:
            where = ".".join(seen) or "a recipe"
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {'.'.join([*seen, *near])}? " if near else ""
            raise UserError(f"{where} has no key {name!r}: {hint}known are {', '.join(fields) or 'none below it'}")
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
        names = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(kind))
        raise UserError(f"{key} is {value!r}, but it is a group of keys: set one of {names}")
    try:
        return _as(kind, value)
    except ValueError:
        raise UserError(f"{key} is {value!r}, but has to be {_words(kind)}") from None


def parsed(cls: type, key: str, text: str) -> Any:
    """The value of the field `key` of `cls` from a command line: a text as it stands, others in Python's notation."""
    if kind_of(cls, key) is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    return checked(cls, key, value)


def _as(kind: Any, value: Any) -> Any:
    """Raises ValueError if the value is not of this type."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        for one in arguments:
            try:
                return _as(one, value)
            except ValueError:
                continue
        raise ValueError
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple | list):
            raise ValueError
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise ValueError
        return tuple(map(_as, kinds, value))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError
    return value


def _words(kind: Any) -> str:
    """A type for an error message."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(map(_words, reversed(arguments)))  # None first
    if typing.get_origin(kind) is tuple:
        if arguments[-1] is Ellipsis:
            return f"a tuple, each element {_words(arguments[0])}"
        return f"({', '.join(map(_words, arguments))})"
    return WORDS[kind]
