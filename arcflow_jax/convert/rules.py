"""Rules, the entries of a table: one line for each kind of tensor, valid in both directions.

A table is a module (or any object) with

- `RULES`, a tuple of `Rule`;
- `IGNORED` (optional), names that are not used on purpose: `{name}` stands for an integer and `*` for anything;
- `ALIASES` (optional), other names of the same tensors. A key is a prefix of a name in whole dotted parts, or a full
  name, and its value replaces it: `{"encoder.embed_tokens": "shared"}` renames a
  tensor, `{"text_model": ""}` drops a prefix, and `{"encoder": "text_model.encoder"}` adds one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Form:
    """How a tensor is laid out in the checkpoint and here: two functions of an array, inverse to each other.

    Attributes:
      lora: the forms of LoRA's A and B beside it, of a linear layer that can have one in our exports.
    """

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]
    lora: tuple[Form, Form] | None = None


AS_IS = Form(lambda x: x, lambda x: x)
TRANSPOSED = Form(np.transpose, np.transpose)
LINEAR = dataclasses.replace(TRANSPOSED, lora=(TRANSPOSED, TRANSPOSED))  # [out, in] <-> [in, out]
CONV = Form(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
POINTWISE = Form(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # OI11, a 1×1 convolution <-> [in, out]


def swap(x: np.ndarray) -> np.ndarray:
    """The two halves of the first axis, swapped."""
    return np.roll(x, len(x) // 2, axis=0)


SWAPPED = Form(swap, swap)
SWAPPED_LINEAR = Form(lambda x: swap(x).T, lambda x: swap(x.T))


def grouped(size: int, *, outputs: int = 1, inputs: int = 1) -> Form:
    """The form of a linear layer that computes or reads several parts, whose features are grouped here.

    [out, in] in the checkpoint, one part after the other. Here [in, out], the first `size` features of each part, the
    next ones, and so on.

    Args:
      size: of a group, or what of it divides a part that it does not divide.
      outputs, inputs: number of parts.
    """

    def group(x: np.ndarray, parts: int) -> np.ndarray:
        rows = math.gcd(len(x) // parts, size)
        return x.reshape(parts, -1, rows, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    def ungroup(x: np.ndarray, parts: int) -> np.ndarray:
        rows = math.gcd(len(x) // parts, size)
        return x.reshape(-1, parts, rows, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    def form(outputs: int, inputs: int, lora: tuple[Form, Form] | None = None) -> Form:
        return Form(
            lambda x: group(group(x, outputs).T, inputs), lambda x: ungroup(ungroup(x, inputs).T, outputs), lora
        )

    return form(outputs, inputs, (form(1, inputs), form(outputs, 1)))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor: its name in the checkpoint, its dotted path in the NNX state, its layout.

    `{layer}` in the source is the index of a stacked layer. The target, whose array is [L, ...], does not have it.
    Any other `{name}` stands for an integer in both.

    A source tensor may contain several targets, concatenated along its first axis. Then `fused` lists them all, in that
    order, and each has its own rule. The number of rows of each follows from the shapes of the targets.

    `least` is the least value that a tensor may have.
    """

    source: str
    target: str
    form: Form = AS_IS
    fused: tuple[str, ...] = ()
    least: float = -math.inf


def linear(source: str, target: str) -> tuple[Rule, Rule]:
    """The rules of a linear layer with bias."""
    return Rule(f"{source}.weight", f"{target}.kernel", LINEAR), Rule(f"{source}.bias", f"{target}.bias")


def kernel(source: str, target: str, form: Form = LINEAR) -> Rule:
    """The rule of a linear layer without bias."""
    return Rule(f"{source}.weight", f"{target}.kernel", form)


def fused(source: str, *targets: str) -> tuple[Rule, ...]:
    """The rules of a linear layer with bias that contains several of our layers, concatenated along the outputs."""
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
    parts = re.split(r"\{(\w+)\}", text)  # text and placeholder names alternate
    texts = [".*".join(map(re.escape, part.split("*"))) for part in parts[::2]]
    integers = [rf"(?P<{name}>\d+)" for name in parts[1::2]]
    return re.compile("".join(text + integer for text, integer in itertools.zip_longest(texts, integers, fillvalue="")))


def canonical(table: Any, name: str) -> str:
    """The name of a source tensor in the table's rules; see `ALIASES` in the module docstring."""
    for other, ours in getattr(table, "ALIASES", {}).items():
        if name == other or name.startswith(f"{other}."):
            return (ours + name[len(other) :]).removeprefix(".")
    return name
