"""NNX states as flat dicts by dotted path, and as the nested dicts that Orbax stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx


def flatten(state: nnx.State) -> dict[str, nnx.Variable]:
    """The variables of a state by dotted path."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def unflatten(state: nnx.State, arrays: Mapping[str, Any]) -> nnx.State:
    """A state of the same structure with the values of `arrays`, by dotted path."""
    return nnx.from_flat_state(
        [(path, variable.replace(arrays[".".join(map(str, path))])) for path, variable in nnx.to_flat_state(state)]
    )


def shapes_of(state: nnx.State) -> dict[str, tuple[int, ...]]:
    """The shapes of a state's variables by dotted path."""
    return {path: tuple(variable.shape) for path, variable in flatten(state).items()}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths to nested dicts: {"a.0.b": x} → {"a": {"0": {"b": x}}}, the form that Orbax stores."""
    root: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = root
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return root


def unnest(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`."""
    flat = {}
    for name, value in tree.items():
        flat |= unnest(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
