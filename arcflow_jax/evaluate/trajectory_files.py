"""What the files of a trajectory report may hold: types of trajectory.json and of a batch in the unfinished report."""

# P points of comparison

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from msgspec import Meta

from arcflow_jax.errors import UserError

Figure = Annotated[float, Meta(ge=-1e30, le=1e30)]
Square = Annotated[float, Meta(ge=0, le=1e30)]
Sigma = Annotated[float, Meta(ge=0, le=1)]


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
class Parts:
    """The parts of an error."""

    total: Figure
    local: Figure
    drift: Figure
    cross: Figure


@dataclasses.dataclass(frozen=True)
class PartsCurves:
    """The parts of an error at each σ."""

    sigma: tuple[Sigma, ...]
    total: tuple[Figure, ...]
    local: tuple[Figure, ...]
    drift: tuple[Figure, ...]
    cross: tuple[Figure, ...]

    def __post_init__(self):
        if len({len(values) for values in dataclasses.astuple(self)}) > 1:
            raise UserError("sigma, total, local, drift and cross have different lengths")


@dataclasses.dataclass(frozen=True)
class Curves:
    velocity: PartsCurves
    state: PartsCurves


@dataclasses.dataclass(frozen=True)
class Segment:
    sigma: tuple[Sigma, Sigma]
    velocity: Parts
    state: Parts
    closed_form: Figure
    curves: Curves


@dataclasses.dataclass(frozen=True)
class Report:
    """trajectory.json; see `trajectory_report.figures`."""

    identity: dict[str, Any]
    endpoint: Endpoint
    segments: tuple[Segment, ...]
