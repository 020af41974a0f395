"""The rules that tables are made of: one line for each kind of tensor, read in both directions.

A table is a module (or any object) with

- `RULES`, a tuple of `Rule`: one line for each kind of tensor, read in both directions;
- `IGNORED` (optional), names knowingly unused: `{name}` stands for an integer and `*` for anything;
- `ALIASES` (optional), other names in use for the same tensors. A key is the beginning of a name, in whole dotted
  parts (so a full name is one too), and its value replaces it: `{"encoder.embed_tokens": "shared"}` renames a
  tensor, `{"text_model": ""}` drops a prefix, and `{"encoder": "text_model.encoder"}` adds one.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np


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


def pattern(text: str) -> re.Pattern[str]:
    """A regular expression for a name in which `{name}` stands for an integer and `*` for anything."""
    parts = re.split(r"\{(\w+)\}", text)  # text and placeholder names take turns
    texts = [".*".join(map(re.escape, part.split("*"))) for part in parts[::2]]
    integers = [rf"(?P<{name}>\d+)" for name in parts[1::2]]
    return re.compile("".join(text + integer for text, integer in itertools.zip_longest(texts, integers, fillvalue="")))


def canonical(table: Any, name: str) -> str:
    """The name by which the table's rules know a source tensor; see the module's docstring on `ALIASES`."""
    for other, ours in getattr(table, "ALIASES", {}).items():
        if name == other or name.startswith(f"{other}."):
            return (ours + name[len(other) :]).removeprefix(".")
    return name
