"""What the files of a trajectory report may hold: types of trajectory.json and of a batch in the unfinished report."""

# P points of comparison

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta

from arcflow_jax.errors import UserError

Figure = Annotated[float, Meta(ge=-1e30, le=1e30)]
Square = Annotated[float, Meta(ge=0, le=1e30)]
Sigma = Annotated[float, Meta(ge=0, le=1)]
PARTS = {"total", "local", "drift", "cross"}  # of an error


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some prompts' part of a `Tally`, as JSON."""

    sums: dict[str, dict[str, tuple[Figure, ...]]]
    student: tuple[Square, ...]
    teacher: tuple[Square, ...]

    def __post_init__(self):
        if len(self.student) != len(self.teacher):
            raise UserError(f"student has {len(self.student)} prompts and teacher {len(self.teacher)}")


@dataclasses.dataclass(frozen=True)
class EndpointErrors:
    mean: Square
    median: Square
    each: tuple[Square, ...]
    standard_error: Square | None = None


@dataclasses.dataclass(frozen=True)
class Endpoint:
    student: EndpointErrors
    teacher: EndpointErrors
    relative: Square | None = None


@dataclasses.dataclass(frozen=True)
class Curves:
    """At each σ, the parts of an error, and what belongs to them, by name."""

    velocity: dict[str, tuple[Figure, ...]]
    state: dict[str, tuple[Figure, ...]]

    def __post_init__(self):
        for name, curves in vars(self).items():
            check_parts(name, curves, {"sigma"} | PARTS)
            if len(set(map(len, curves.values()))) > 1:
                raise UserError(f"{name}: {', '.join(curves)} have different lengths")
            if not all(0 <= sigma <= 1 for sigma in curves["sigma"]):
                raise UserError(f"{name}.sigma has a number that is not from 0 to 1")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Means over a segment, or at its end; see `report.figures`."""

    sigma: tuple[Sigma, Sigma]
    velocity: dict[str, Figure]
    state: dict[str, Figure]
    closed_form: Figure
    curves: Curves

    def __post_init__(self):
        check_parts("velocity", self.velocity, PARTS)
        check_parts("state", self.state, PARTS)


def check_parts(name: str, found: Mapping[str, Any], needed: set[str]) -> None:
    """Raises UserError if a part of an error is missing."""
    if missing := sorted(needed - found.keys()):
        raise UserError(f"missing {', '.join(f'{name}.{part}' for part in missing)}")


@dataclasses.dataclass(frozen=True)
class Report:
    """trajectory.json; see `report.figures`."""

    identity: dict[str, Any]
    endpoint: Endpoint
    segments: tuple[Segment, ...]
