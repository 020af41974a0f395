"""What may stand in a file, a recipe or a call: frozen dataclasses whose types say it, and values checked by them.

A number's type has its range (`Width`, `Share`, …). Each range holds every model and run that could exist; a number
outside is a typing error or damage. NaN lies in no range. msgspec checks types and ranges.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from arcflow_jax.errors import UserError, one_line

T = TypeVar("T")

# Networks
Layers = Annotated[int, Meta(ge=1, le=1000)]  # tensors have a number each: no network has more layers than tensors
Width = Annotated[int, Meta(ge=1, le=2**20)]  # widths, heads, vocabularies, positions
Token = Annotated[int, Meta(ge=0, le=2**20)]
Depth = Annotated[int, Meta(ge=1, le=16)]  # layers that are not stacked, of a block
Widths = Annotated[tuple[Width, ...], Meta(min_length=1, max_length=16)]
Epsilon = Annotated[float, Meta(gt=0, le=1)]
Theta = Annotated[float, Meta(ge=1, le=1e12)]
Scale = Annotated[float, Meta(ge=1e-6, le=1e6)]
Offset = Annotated[float, Meta(ge=-1e6, le=1e6)]
# Students and training
Modes = Annotated[int, Meta(ge=1, le=1024)]
States = Annotated[int, Meta(ge=1, le=1000)]
Window = Annotated[int, Meta(ge=0, le=10**6)]  # substeps
Rank = Annotated[int, Meta(ge=1, le=2**16)]
Momentum = Annotated[float, Meta(gt=0, le=1000)]
Rate = Annotated[float, Meta(ge=0, le=10)]  # learning rates, weight decay
Weight = Annotated[float, Meta(ge=0, le=1e6)]
Norm = Annotated[float, Meta(gt=0, le=1e9)]
Power = Annotated[float, Meta(ge=0, le=1000)]
TrainingSteps = Annotated[int, Meta(ge=0, le=10**9)]
Period = Annotated[int, Meta(ge=1, le=10**9)]  # in training steps
AxisSize = Annotated[int, Meta(ge=-1, le=10**6)]
# Images
NFE = Annotated[int, Meta(ge=1, le=10_000)]
Shift = Annotated[float, Meta(ge=1e-3, le=1000)]
Ratio = Annotated[float, Meta(ge=1e-3, le=1000)]
Strength = Annotated[float, Meta(gt=0, le=1)]
Guidance = Annotated[float, Meta(ge=0, le=1000)]
Pixels = Annotated[int, Meta(ge=1, le=2**16)]
# Anything
Batch = Annotated[int, Meta(ge=1, le=2**16)]
Seed = Annotated[int, Meta(ge=0, extra={"le": 2**64 - 1})]  # msgspec's own bounds have 63 bits
Count = Annotated[int, Meta(ge=1, le=10**9)]
Size = Annotated[int, Meta(ge=0, le=2**60)]  # bytes
Share = Annotated[float, Meta(ge=0, lt=1)]
SHA256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", description="a SHA-256, 64 hexadecimal digits")]
Precision = Literal["float32", "bfloat16", "float16"]


def parse(cls: type[T], values: Any, where: object, *, own: bool = False, prefix: str = "") -> T:
    """A `cls`, a dataclass, from the values of a JSON object.

    null stands for an absent value. In our own formats it is a value, which only some fields may have.

    A field that is a dataclass is filled from a nested object. The metadata {"key": …} of a field gives its name in
    the file where that is another. A dataclass may list in `REQUIRED`, name → value, the settings that its network has
    built in: a checkpoint with another value is of another architecture, and is refused instead of computed wrongly. It
    may have a function `flat` that moves nested settings to the top level.

    Args:
      where: the file, for errors.
      own: whether the format is ours, which has no other keys. In others, such as config.json, they are ignored.
      prefix: of the field's names, in errors.

    Raises:
      UserError: naming `where`, the field and its value, if `values` is not a dict, a value is missing, has the wrong
        type or lies outside of its range, the values contradict one another, or a `REQUIRED` setting differs.
    """
    if not isinstance(values, dict):
        name = f"{where}: {prefix.removesuffix('.')}" if prefix else where
        raise UserError(f"{name} is {shown(values)}, but has to be a JSON object")
    hints, fields = types_of(cls), {key_of(field): field for field in dataclasses.fields(cls)}
    try:
        values = getattr(cls, "flat", dict)(values)
        for name, value in getattr(cls, "REQUIRED", {}).items():
            found = values.get(name, value)
            if found != value or isinstance(found, bool) is not isinstance(value, bool):  # 0 == False
                raise UserError(f"{prefix}{name} is {shown(found)}, only {value!r} is supported")
        if own and (unknown := [key for key in values if key not in fields]):
            near = difflib.get_close_matches(unknown[0], fields, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown {prefix}{one_line(unknown[0])}: {hint}known are {', '.join(fields)}")
        given = {
            key: field
            for key, field in fields.items()
            if key in values and (values[key] is not None or (own and not takes_none(hints[field.name])))
        }
        if missing := sorted(key for key, field in fields.items() if key not in given and no_default(field)):
            raise UserError(f"missing {', '.join(prefix + key for key in missing)}")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    filled = {
        field.name: converted(hints[field.name], values[key], f"{where}: {prefix}{key}", own=own)
        for key, field in given.items()
    }
    try:
        return cls(**filled)
    except UserError as error:
        raise UserError(f"{where}: {prefix}{error}") from error


def unparse(instance: Any) -> dict[str, Any]:
    """The inverse of `parse`: a dataclass as a JSON object."""
    return {key_of(field): plain(getattr(instance, field.name)) for field in dataclasses.fields(instance)}


def plain(value: Any) -> Any:
    """A value of a dataclass's field as JSON has it."""
    if dataclasses.is_dataclass(value):
        return unparse(value)
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def check(instance: Any) -> None:
    """For `__post_init__`: raises UserError unless all fields, which any caller may have given, have their types.

    A list becomes a tuple, a whole number a float where the field is one, a number of NumPy one of Python.
    """
    for name, hint in types_of(type(instance)).items():
        value = getattr(instance, name)
        if not dataclasses.is_dataclass(value):
            object.__setattr__(instance, name, converted(hint, value, name))


def check_multiple(instance: Any, whole: str, part: str) -> None:
    """Raises UserError unless one field is a multiple of another."""
    if getattr(instance, whole) % getattr(instance, part):
        raise UserError(
            f"{whole} is {getattr(instance, whole)}, but has to be a multiple of {part}, {getattr(instance, part)}"
        )


def nested(values: dict[str, Any], name: str) -> dict[str, Any]:
    """An object in a JSON object, {} if it is absent or null. Raises UserError if it is something else."""
    if not isinstance(found := values.get(name) or {}, dict):
        raise UserError(f"{name} is {shown(found)}, but has to be a JSON object")
    return found


def converted(hint: Any, value: Any, name: str, *, own: bool = False) -> Any:
    """A value as a field of this type has it. Raises UserError that names `name`."""
    kind = typing.get_origin(hint) or hint
    if kind in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
        if value is not None and len(parts) == 1:
            return converted(parts[0], value, name, own=own)
    if dataclasses.is_dataclass(hint):
        where, _, field = name.rpartition(": ")
        return parse(hint, value, where or name, own=own, prefix=f"{field}." if where else "")
    if kind is dict and isinstance(value, dict):
        _, inner = typing.get_args(hint)
        return {key: converted(inner, each, f"{name}.{one_line(key)}", own=own) for key, each in value.items()}
    if (
        kind is tuple
        and isinstance(value, list | tuple)
        and dataclasses.is_dataclass(inner := typing.get_args(hint)[0])
    ):
        return tuple(converted(inner, each, f"{name}.{i}", own=own) for i, each in enumerate(value))
    if getattr(value, "ndim", None) == 0:  # a number of NumPy or JAX
        value = value.item()
    try:
        result = msgspec.convert(value, hint)
        if isinstance(result, str):
            result.encode()  # fails for half a surrogate pair, which is no text
    except (msgspec.ValidationError, UnicodeEncodeError):
        raise UserError(f"{name} is {shown(value)}, but has to be {describe(hint)}") from None
    if isinstance(result, int) and result > limits(hint).get("le", result):
        raise UserError(f"{name} is {shown(value)}, but has to be {describe(hint)}")
    return result


def takes_none(hint: Any) -> bool:
    """Whether None is a value of a type."""
    return types.NoneType in typing.get_args(hint) or hint in (Any, types.NoneType)


def limits(hint: Any) -> dict[str, Any]:
    """The bounds of a type: ge, gt, le, lt, min_length, max_length, description."""
    found: dict[str, Any] = {}
    for meta in typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ():
        names = ("ge", "gt", "le", "lt", "min_length", "max_length", "description")
        found |= {name: getattr(meta, name) for name in names if getattr(meta, name) is not None} | (meta.extra or {})
    return found


def describe(hint: Any) -> str:
    """What a field has to be, in an error message."""
    bounds = limits(hint)
    if "description" in bounds:
        return bounds["description"]
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return " or ".join(describe(part) for part in parts if part is not types.NoneType)
    if kind is tuple:
        if parts[-1] is not Ellipsis:
            words = list(dict.fromkeys(map(describe, parts)))
            return f"a list of {len(parts)}, {'each ' if len(words) == 1 else ''}{' and '.join(words)}"
        length = f" of {bounds['min_length']} to {bounds['max_length']}" if "max_length" in bounds else ""
        return f"a list{length}, each {describe(parts[0])}"
    if kind is Literal:
        return " or ".join(map(repr, parts))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a JSON object"}
    return names.get(kind, str(kind)) + span(bounds)


def span(bounds: dict[str, Any]) -> str:
    """A range, in an error message."""
    if not bounds.keys() & {"ge", "gt"}:
        return ""
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if "ge" in bounds and "le" in bounds:
        return f" from {low} to {high}"
    return f" {'at least' if 'ge' in bounds else 'above'} {low} and {'at most' if 'le' in bounds else 'below'} {high}"


@functools.cache
def types_of(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, with their ranges."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def numbers(hint: Any) -> Iterator[Any]:
    """The types of the numbers that a type holds, down to those of nested dataclasses."""
    if hint in (int, float) or (typing.get_origin(hint) is Annotated and typing.get_args(hint)[0] in (int, float)):
        yield hint
    elif dataclasses.is_dataclass(hint):
        for inner in types_of(hint).values():
            yield from numbers(inner)
    else:
        for inner in typing.get_args(hint):
            yield from numbers(inner)


def key_of(field: dataclasses.Field) -> str:
    """A field's name in the file."""
    return field.metadata.get("key", field.name)


def no_default(field: dataclasses.Field) -> bool:
    """Whether a dataclass's field has to be given."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def shown(value: Any) -> str:
    """A value in an error message: its notation in Python, shortened, on one line."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxlong = 40
    try:
        return one_line(short.repr(value))
    except ValueError:  # Python refuses to write a number of thousands of digits
        return "a number of thousands of digits"
