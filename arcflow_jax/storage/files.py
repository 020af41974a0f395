"""JSON files, digests, and a network's geometry, a frozen dataclass, from its config.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from arcflow_jax.errors import UserError
from arcflow_jax.storage.atomic import whole_file

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it is missing or is not a JSON object."""
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
    """Writes a JSON file, which appears whole or not at all. Raises OSError."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n")


def digest(values: Iterable[Any]) -> str:
    """SHA-256 of a list, as JSON has it."""
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()


def parse_config(cls: type[T], config: dict[str, Any], where: str) -> T:
    """A `cls` filled from the keys of `config` that are its fields; other keys do not concern the geometry.

    A dataclass may list in `REQUIRED`, name → value, the settings that its network has built in: a checkpoint
    that says otherwise is another architecture, and is refused rather than computed wrongly. It may have a function
    `flat` that brings to the top level what a config.json keeps deeper.

    Raises:
      UserError: naming `where`, if a field without a default is absent or a `REQUIRED` setting differs.
    """
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
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
