"""Communication of a compiled program, read from its HLO text."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# %name = type operation(…: a type is an array or a tuple of arrays, with layouts; an array contains no spaces
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind, on one device in one run.

    Attributes:
      count: number of collectives.
      bytes: total size of their results.
    """

    count: int
    bytes: int


def collectives(hlo: str) -> dict[str, Traffic]:
    """Traffic by kind, with loop bodies counted once per trip; `hlo` is `compiled.as_text()`."""
    computations, entry = _computations(hlo)
    counts, sizes = Counter(), Counter()

    def visit(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            _, result, operation = match.groups()
            # An asynchronous collective is counted at its end, whose result is the collective's own
            kind = operation.removesuffix("-done")
            if kind in KINDS:
                counts[kind] += times
                sizes[kind] += times * _bytes(result)
            inside = times * (_trips(line, computations) if operation == "while" else 1)
            branches = _BRANCHES.search(line)
            called = [b.strip().lstrip("%") for b in branches.group(1).split(",")] if branches else []
            for callee in _CALLED.findall(line) + called:
                visit(callee, inside)

    visit(entry, 1)
    return {kind: Traffic(counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by name, and the name of the entry computation."""
    found: dict[str, list[str]] = {}
    entry = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            lines = found.setdefault(match.group(2), [])
            entry = match.group(2) if match.group(1) else entry
        elif found:
            lines.append(line)
    return found, entry


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """Trip count of a while loop: XLA's own note, or the constant that the loop condition compares its counter with."""
    if known := _TRIPS.search(line):
        return int(known.group(1))
    condition = "\n".join(computations[_CONDITION.search(line).group(1)])
    constants = _CONSTANT.findall(condition)
    return int(constants[0]) if len(constants) == 1 and "direction=LT" in condition else 1


def _bytes(result: str) -> int:
    """Size of an HLO result type."""
    total = 0
    for dtype, shape in _ARRAY.findall(result):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
        size = 1
        for dimension in filter(None, shape.split(",")):
            size *= int(dimension)
        total += size * bits // 8
    return total
