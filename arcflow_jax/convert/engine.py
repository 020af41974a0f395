"""The strict engine: checkpoint tensors to NNX states and back, by a table of rules (see `convert.rules`).

Strict means: every tensor of the source is used or on the ignore list, every target is filled in all its layers, shapes
agree, dtypes are floating, values are finite. Names, shapes and dtypes are checked before values are converted, and one
`UserError` lists all that is wrong. Values are then read layer by layer (`layers`), so a checkpoint may be larger than
the memory.
"""

# L stacked layers

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from arcflow_jax.convert.rules import Form, Rule, canonical, pattern
from arcflow_jax.errors import UserError, first_few
from arcflow_jax.networks.states import flatten, shapes_of, unflatten

DTYPES = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16))


class Tensor(Protocol):
    """A tensor of a source: shape and dtype, and values that `np.asarray` reads."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


class Fill(NamedTuple):
    """A target and the source tensors that fill it.

    Attributes:
      target: dotted path of the target.
      shape: shape of the target, [L, ...] if it is stacked.
      names: names of the source tensors: one, or for a stacked target one per layer, in order.
      stacked: whether the target has a layer axis.
      form: the layout.
      source_shape: shape of each source tensor.
      rows: the rows of the source tensor that belong to the target; None for all.
      least: of its values.
    """

    target: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    form: Form
    source_shape: tuple[int, ...]
    rows: slice | None
    least: float


def source_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a rule reads from the source, per layer, for a target of this shape."""
    ours = shape[1:] if "{layer}" in rule.source else shape
    return rule.form.to_theirs(np.broadcast_to(np.int8(0), ours)).shape


def fills(table: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[Fill]:
    """How the table's rules fill each target (path → shape).

    Raises:
      ValueError: if a target has no rule or several. That is an error in the table, not in a checkpoint.
    """
    rules = [(rule, pattern(rule.target)) for rule in table.RULES]
    plan = []
    for target, shape in shapes.items():
        matches = [(rule, match) for rule, regex in rules if (match := regex.fullmatch(target))]
        if len(matches) != 1:
            raise ValueError(
                f"{target} is the target of {len(matches)} rules of {table!r}, but has to be the target of one"
            )
        ((rule, match),) = matches
        stacked = "{layer}" in rule.source
        indices = match.groupdict()
        numbers = range(shape[0]) if stacked else (None,)
        names = tuple(rule.source.format(**indices, layer=number) for number in numbers)
        whole, rows = source_shape(rule, shape), None
        if rule.fused:
            parts = [part.format(**indices) for part in rule.fused]
            ends = list(itertools.accumulate(source_shape(rule, shapes[part])[0] for part in parts))
            end = ends[parts.index(target)]
            whole, rows = (ends[-1], *whole[1:]), slice(end - whole[0], end)
        plan.append(Fill(target, shape, names, stacked, rule.form, whole, rows, rule.least))
    return plan


def check(
    table: Any, source: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str
) -> Iterator[tuple[Fill, list[Tensor]]]:
    """Each target with the source tensors that fill it, and their names in the source.

    All names, shapes and dtypes are checked before this returns. `layers` reads values; here only those of a tensor
    that has two names are compared.

    Raises:
      UserError: one line that names `where` and lists what is missing, left over and wrong.
    """
    plan = fills(table, shapes)
    names: dict[str, str] = {}  # canonical name -> name in the source
    wrong = []
    for name in source:
        first = names.setdefault(canonical(table, name), name)
        if first != name and not same(source[first], source[name]):
            wrong.append(f"{first} and {name} are two names of one tensor, but their values differ")

    needed = {name for fill in plan for name in fill.names}
    ignored = [pattern(text) for text in getattr(table, "IGNORED", ())]
    missing = [name for fill in plan for name in fill.names if name not in names]
    left_over = [
        name
        for ours, name in names.items()
        if ours not in needed and not any(regex.fullmatch(ours) for regex in ignored)
    ]
    for fill in plan:
        for name in fill.names:
            tensor = source[names[name]] if name in names else None
            if tensor is not None and tuple(tensor.shape) != fill.source_shape:
                wrong.append(f"{names[name]} is {list(tensor.shape)} instead of {list(fill.source_shape)}")
            elif tensor is not None and tensor.dtype not in DTYPES:
                wrong.append(f"{names[name]} is {tensor.dtype} instead of {' or '.join(map(str, DTYPES))}")

    # Each target of a fused tensor reports it; list it once
    findings = {"missing": unique(missing), "left over": left_over, "wrong": unique(wrong)}
    if any(findings.values()):
        raise UserError(
            f"{where}: "
            + "; ".join(f"{len(items)} {kind} ({first_few(items)})" for kind, items in findings.items() if items)
        )
    theirs = [fill._replace(names=tuple(names[name] for name in fill.names)) for fill in plan]
    return ((fill, [part(source[name], fill.rows) for name in fill.names]) for fill in theirs)


def part(tensor: Tensor, rows: slice | None) -> Tensor:
    """Some rows of a tensor, or all of it."""
    return tensor if rows is None else tensor[rows]


def unique(items: Iterable[str]) -> list[str]:
    """The items without repetitions, in order."""
    return list(dict.fromkeys(items))


def nearest(tables: Sequence[Any], source: Iterable[str]) -> Any:
    """The table whose rules match the most names of the source; the first one if several match equally many."""
    names = list(source)

    def known(table: Any) -> int:
        rules = [pattern(rule.source) for rule in table.RULES]
        return sum(any(rule.fullmatch(canonical(table, name)) for rule in rules) for name in names)

    return max(tables, key=known)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether shapes and values are equal."""
    return tuple(a.shape) == tuple(b.shape) and np.array_equal(np.asarray(a), np.asarray(b))


def layers(fill: Fill, tensors: Sequence[Tensor], dtype: Any = None, where: str = "checkpoint") -> Iterator[np.ndarray]:
    """The layers of a stacked target, in order, or the whole target: contiguous, read one at a time.

    Args:
      fill, tensors: as `check` returns them.
      dtype: dtype of the result; by default that of the source (the widest one, if its layers differ).
      where: name of the source in error messages.

    Raises:
      UserError: if a value is NaN or infinite in the source, or becomes so in `dtype`, or is less than it may be.
    """
    dtype = np.dtype(dtype or jnp.result_type(*(tensor.dtype for tensor in tensors)))
    for name, tensor in zip(fill.names, tensors, strict=True):
        array = cast(np.asarray(tensor), dtype, f"{where}: {name}")
        if fill.least > -np.inf and array.size and array.min() < fill.least:
            raise UserError(f"{where}: {name} holds {array.min():.3g}, but has to be at least {fill.least:g}")
        yield np.asarray(fill.form.to_ours(array), order="C")


def cast(array: np.ndarray, dtype: Any, where: str) -> np.ndarray:
    """`array` in `dtype`. Raises UserError, with `where` in its message, if a value is or becomes NaN or infinite."""
    with np.errstate(over="ignore"):  # a value too large for dtype becomes infinite, and is refused below
        array = array.astype(dtype, copy=False)
    if not np.isfinite(array).all():
        raise UserError(f"{where} holds NaN or infinite values in {np.dtype(dtype)}")
    return array


def import_tensors(
    table: Any, source: Mapping[str, Tensor], target: nnx.State, dtype: Any = None, where: str = "checkpoint"
) -> nnx.State:
    """`target` filled with the source's tensors, not sharded, on the default device.

    Args:
      table: the rules of the checkpoint layout; see `convert.rules`.
      source: name → array. Arrays may be lazy: values are read one target at a time.
      target: state of the network, abstract (`nnx.state(nnx.eval_shape(...))`) or not; only its shapes are used.
      dtype: dtype of the result; by default that of the source.
      where: name of the source in error messages.

    Raises:
      UserError: one line that lists everything missing, left over and wrong.
    """
    filled = check(table, source, shapes_of(target), where)
    arrays = {}
    for fill, tensors in filled:
        parts = list(layers(fill, tensors, dtype, where))
        arrays[fill.target] = jnp.asarray(np.stack(parts) if fill.stacked else parts[0])
    return unflatten(target, arrays)


def export_tensors(table: Any, state: nnx.State) -> dict[str, np.ndarray]:
    """The tensors of a state with the names and layouts of the checkpoint: the inverse of `import_tensors`."""
    variables = flatten(state)
    parts: dict[str, list[tuple[int, np.ndarray]]] = collections.defaultdict(list)  # tensor name -> (first row, rows)
    for fill in fills(table, shapes_of(state)):
        array = np.asarray(variables[fill.target][...])
        for name, layer in zip(fill.names, array if fill.stacked else [array], strict=True):
            parts[name].append((fill.rows.start if fill.rows else 0, fill.form.to_theirs(layer)))
    return {name: joined([rows for _, rows in sorted(pieces, key=lambda x: x[0])]) for name, pieces in parts.items()}


def joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """One contiguous array; safetensors would write the bytes of a transposed view in the wrong order."""
    return np.asarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces), order="C")
