"""The strict rule engine: checkpoint tensors to NNX states and back, from one table a checkpoint family.

A table is a module (or any object) with

- `RULES`, a tuple of `Rule`: one line for each kind of tensor, read in both directions;
- `IGNORED` (optional), names knowingly unused: `{name}` stands for an integer and `*` for anything;
- `ALIASES` (optional), other names in use for the same tensors. A key is the beginning of a name, in whole dotted
  parts (so a full name is one too), and its value replaces it: `{"encoder.embed_tokens": "shared"}` renames a
  tensor, `{"text_model": ""}` drops a prefix, and `{"encoder": "text_model.encoder"}` adds one.

Strict means: every tensor of the source is used or on the ignore list, every target is filled from every layer,
shapes agree, dtypes are floating, values are finite. What is wrong is found from names and shapes before anything
is read, and is told in one `UserError`. Reading then goes layer by layer (`layers`), so that a checkpoint larger than
the memory can pass through.
"""

# L stacked layers

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from arcflow_jax.errors import UserError

DTYPES = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16))
SHOWN = 4  # names that an error message spells out


class Tensor(Protocol):
    """What a source holds: a shape, a dtype, and the values once `np.asarray` asks for them."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Form:
    """How one tensor is laid out there and here: two functions of an array, each undoing the other."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


AS_IS = Form(lambda x: x, lambda x: x)
LINEAR = Form(np.transpose, np.transpose)  # [out, in] <-> [in, out]
CONV = Form(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
POINTWISE = Form(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # OI11, a 1×1 convolution <-> [in, out]


def swap(x: np.ndarray) -> np.ndarray:
    """The two halves of the first axis the other way round."""
    return np.roll(x, len(x) // 2, axis=0)


SWAPPED = Form(swap, swap)
SWAPPED_LINEAR = Form(lambda x: swap(x).T, lambda x: swap(x.T))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor: its name in the checkpoint, its dotted path in the NNX state, its layout.

    `{layer}` in the source is the index of a stacked layer and absent from the target, whose array is [L, ...].
    Any other `{name}` stands for an integer in both.

    A source tensor may hold several targets, one after the other along its first axis: `fused` then lists them all,
    in that order, and there is a rule for each. How many rows each has follows from the targets' shapes.
    """

    source: str
    target: str
    form: Form = AS_IS
    fused: tuple[str, ...] = ()


def linear(source: str, target: str) -> tuple[Rule, Rule]:
    """The rules of a linear layer with bias."""
    return Rule(f"{source}.weight", f"{target}.kernel", LINEAR), Rule(f"{source}.bias", f"{target}.bias")


def fused(source: str, *targets: str) -> tuple[Rule, ...]:
    """The rules of a linear layer with bias whose outputs are those of several of ours, one after the other."""
    kernels, biases = (tuple(f"{target}.{leaf}" for target in targets) for leaf in ("kernel", "bias"))
    return (
        *(Rule(f"{source}.weight", kernel, LINEAR, kernels) for kernel in kernels),
        *(Rule(f"{source}.bias", bias, AS_IS, biases) for bias in biases),
    )


def conv(source: str, target: str) -> tuple[Rule, Rule]:
    """The rules of a convolution with bias."""
    return Rule(f"{source}.weight", f"{target}.kernel", CONV), Rule(f"{source}.bias", f"{target}.bias")


def norm(source: str, target: str) -> tuple[Rule, Rule]:
    """The rules of a norm with scale and bias."""
    return Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")


class Fill(NamedTuple):
    """One target and what fills it.

    Attributes:
      target: its dotted path.
      shape: of the target, [L, ...] if it is stacked.
      names: of the source tensors: one or, for a stacked target, one a layer in order.
      stacked: whether the target has a layer axis.
      form: the layout.
      source_shape: of each source tensor.
      rows: which of the source tensor's rows are the target's; None for all.
    """

    target: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    form: Form
    source_shape: tuple[int, ...]
    rows: slice | None


def pattern(text: str) -> re.Pattern[str]:
    """A regular expression for a name in which `{name}` stands for an integer and `*` for anything."""
    parts = re.split(r"\{(\w+)\}", text)  # text and placeholder names take turns
    texts = [".*".join(map(re.escape, part.split("*"))) for part in parts[::2]]
    integers = [rf"(?P<{name}>\d+)" for name in parts[1::2]]
    return re.compile("".join(text + integer for text, integer in itertools.zip_longest(texts, integers, fillvalue="")))


def flatten(state: nnx.State) -> dict[str, nnx.Variable]:
    """The variables of a state by dotted path."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def unflatten(state: nnx.State, arrays: Mapping[str, Any]) -> nnx.State:
    """A state of the same structure with the values of `arrays`, by dotted path."""
    return nnx.from_flat_state(
        [(path, variable.replace(arrays[".".join(map(str, path))])) for path, variable in nnx.to_flat_state(state)]
    )


def source_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of what a rule reads from the source (each layer's) for a target of this shape."""
    ours = shape[1:] if "{layer}" in rule.source else shape
    return rule.form.to_theirs(np.broadcast_to(np.int8(0), ours)).shape


def fills(table: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[Fill]:
    """What fills each target (path → shape), by the table's rules.

    Raises:
      ValueError: if a target has no rule or more than one. That is a fault of the table, not of a checkpoint.
    """
    rules = [(rule, pattern(rule.target)) for rule in table.RULES]
    plan = []
    for target, shape in shapes.items():
        matches = [(rule, match) for rule, regex in rules if (match := regex.fullmatch(target))]
        if len(matches) != 1:
            raise ValueError(f"{target} is the target of {len(matches)} rules of {table!r}, not of one")
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
        plan.append(Fill(target, shape, names, stacked, rule.form, whole, rows))
    return plan


def canonical(table: Any, name: str) -> str:
    """The name by which the table's rules know a source tensor; see the module's docstring on `ALIASES`."""
    for other, ours in getattr(table, "ALIASES", {}).items():
        if name == other or name.startswith(f"{other}."):
            return (ours + name[len(other) :]).removeprefix(".")
    return name


def check(
    table: Any, source: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str
) -> Iterator[tuple[Fill, list[Tensor]]]:
    """Each target with the source tensors that fill it, and their names in the source.

    All names, shapes and dtypes are looked at before this returns; values are read only by `layers`.

    Raises:
      UserError: one line that names `where` and lists what is missing, left over and wrong.
    """
    plan = fills(table, shapes)
    names: dict[str, str] = {}  # canonical name -> name in the source
    wrong = []
    for name in source:
        first = names.setdefault(canonical(table, name), name)
        if first != name and not same(source[first], source[name]):
            wrong.append(f"{first} and {name} are two names of one tensor but differ")

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

    # a fused tensor is named by each of its targets, and told once
    findings = {"missing": unique(missing), "left over": left_over, "wrong": unique(wrong)}
    if any(findings.values()):
        raise UserError(
            f"{where}: "
            + "; ".join(f"{len(items)} {kind} ({first_few(items)})" for kind, items in findings.items() if items)
        )
    theirs = [fill._replace(names=tuple(names[name] for name in fill.names)) for fill in plan]
    return ((fill, [part(source[name], fill.rows) for name in fill.names]) for fill in theirs)


def part(tensor: Tensor, rows: slice | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def nearest(tables: Sequence[Any], source: Iterable[str]) -> Any:
    """The table whose rules know the most of the source's names; the first of equals."""
    names = list(source)

    def known(table: Any) -> int:
        rules = [pattern(rule.source) for rule in table.RULES]
        return sum(any(rule.fullmatch(canonical(table, name)) for rule in rules) for name in names)

    return max(tables, key=known)


def same(a: Tensor, b: Tensor) -> bool:
    return tuple(a.shape) == tuple(b.shape) and np.array_equal(np.asarray(a), np.asarray(b))


def first_few(items: Sequence[str]) -> str:
    """Some names for an error message, cut to the first few."""
    return ", ".join(items[:SHOWN]) + (", …" if len(items) > SHOWN else "")


def layers(fill: Fill, tensors: Sequence[Tensor], dtype: Any = None, where: str = "checkpoint") -> Iterator[np.ndarray]:
    """The layers of a stacked target, in order, or a target as a whole: contiguous, read one at a time.

    Args:
      fill, tensors: as `check` gives them.
      dtype: of the result; by default that of the source (the widest, if its layers differ).
      where: what error messages call the source.

    Raises:
      UserError: if a value is NaN or infinite, in the source or in `dtype`.
    """
    dtype = np.dtype(dtype or jnp.result_type(*(tensor.dtype for tensor in tensors)))
    for name, tensor in zip(fill.names, tensors, strict=True):
        with np.errstate(over="ignore"):  # a value too large for dtype becomes infinite, and is refused
            array = np.asarray(tensor).astype(dtype, copy=False)
        if not np.isfinite(array).all():
            raise UserError(f"{where}: {name} holds NaN or infinite values in {dtype}")
        yield np.asarray(fill.form.to_ours(array), order="C")


def shapes_of(state: nnx.State) -> dict[str, tuple[int, ...]]:
    return {path: tuple(variable.shape) for path, variable in flatten(state).items()}


def import_tensors(
    table: Any, source: Mapping[str, Tensor], target: nnx.State, dtype: Any = None, where: str = "checkpoint"
) -> nnx.State:
    """`target` filled with the source's tensors, whole and on the default device.

    Args:
      table: the checkpoint family's rules; see the module's docstring.
      source: name → array. Values may be lazy: they are read one target at a time.
      target: state of the network, abstract (`nnx.state(nnx.eval_shape(...))`) or not; only shapes are looked at.
      dtype: of the result; by default the source's.
      where: what error messages call the source.

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
    """The tensors of a state under the checkpoint family's own names and layouts: `import_tensors` undone."""
    variables = flatten(state)
    parts: dict[str, list[tuple[int, np.ndarray]]] = collections.defaultdict(list)  # of each tensor, by first row
    for fill in fills(table, shapes_of(state)):
        array = np.asarray(variables[fill.target][...])
        for name, layer in zip(fill.names, array if fill.stacked else [array], strict=True):
            parts[name].append((fill.rows.start if fill.rows else 0, fill.form.to_theirs(layer)))
    return {name: joined([rows for _, rows in sorted(pieces, key=lambda x: x[0])]) for name, pieces in parts.items()}


def joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    # contiguous, because safetensors writes the bytes of a transposed view in the wrong order
    return np.asarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces), order="C")
