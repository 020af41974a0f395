"""What was measured, in small files that are committed: a line of JSON for each measurement.

RESULTS/TEACHER/protocol.json                          what all lines share
RESULTS/TEACHER/teacher.jsonl                          the teacher's Euler steps
RESULTS/TEACHER/nfe-2-shift-0.6/legendre-4.jsonl       a cell: its search, its best setting, the published recipe
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

from arcflow_jax import schema
from arcflow_jax.errors import UserError
from arcflow_jax.storage.atomic import append, cannot_write, make_directory, write_file
from arcflow_jax.storage.files import json_records, read_json, read_lines, write_json
from benchmarks.methods.protocol import Cell, Setting
from benchmarks.methods.search import Errors

Part = Literal["search", "best", "published", "schedules", "teacher"]


@dataclasses.dataclass(frozen=True)
class Result:
    """A student after a part of its budget, or the teacher.

    Attributes:
      part: "search", measured on validation prompts; the others on test prompts.
      method, nfe, shift: the cell. Of a teacher, "teacher", its Euler steps and 0.
      setting: None for a teacher.
      seed: of the run.
      share: how much of the budget was used.
      steps: training steps so far.
      calls: teacher calls so far.
      seconds: of a training step, the median, without compilation.
      loss: mean over the last 1/8 of the budget; None if it was not finite.
      figures: of `demo.evaluate.measure`, and, where they were measured, `diversity` relative to the dense teacher's
        and `segments`, the trajectory report's.
    """

    part: Part
    method: str
    nfe: int
    shift: float
    setting: Setting | None = None
    seed: int = 0
    share: float = 0.0
    steps: int = 0
    calls: int = 0
    seconds: float = 0.0
    loss: float | None = None
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def cell(self) -> Cell:
        return Cell(self.method, self.nfe, self.shift)

    @property
    def error(self) -> float:
        """The endpoint error; infinite if it was not finite."""
        error = self.figures["endpoint_error"]
        return math.inf if error is None else error


class Files:
    """The results of a teacher's students.

    Args:
      folder: RESULTS/TEACHER.
      identity: what all results share.

    Raises:
      UserError: if `folder` has results of another identity.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder, self.identity = folder, identity
        known = folder / "protocol.json"
        if known.exists() and (before := read_json(known)) != identity:
            changed = [
                f"{name} was {schema.shown(before.get(name))}, not {schema.shown(identity.get(name))}"
                for name in sorted(before.keys() | identity.keys())
                if before.get(name) != identity.get(name)
            ]
            raise UserError(f"{folder} has results of another protocol: {', '.join(changed)}; choose another --results")

    def path(self, result: Result) -> Path:
        """The file that a result is in."""
        if result.part == "teacher":
            return self.folder / "teacher.jsonl"
        return self.folder / f"nfe-{result.nfe}-shift-{result.shift:g}" / f"{result.method}.jsonl"

    def keep(self, result: Result) -> None:
        """Adds a result. A last line that was cut off is removed before. Raises UserError if it cannot be written."""
        path = self.path(result)
        make_directory(path.parent)
        with cannot_write(path):
            if not (self.folder / "protocol.json").exists():
                write_json(self.folder / "protocol.json", self.identity)
            repair(path)
            with append(path) as file:
                file.write(json.dumps(finite(dataclasses.asdict(result)), allow_nan=False) + "\n")

    def all(self) -> list[Result]:
        """All results. Raises UserError if a file is damaged, other than in a last line that was cut off."""
        found = []
        for path in sorted(self.folder.rglob("*.jsonl")):
            repair(path)
            found += [schema.parse(Result, values, where, own=True) for where, values in json_records(path)]
        return found


def repair(path: Path) -> None:
    """Removes the end of a last line that was not written to its end."""
    if path.exists():
        lines = [line for _, line in read_lines(path)]
        if lines and not lines[-1].endswith(b"\n"):
            write_file(path, b"".join(lines[:-1]))


def finite(value: Any) -> Any:
    """A JSON value with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def errors(results: list[Result], cell: Cell) -> Errors:
    """The errors of a cell's search."""
    return {(r.setting, r.share): r.error for r in results if r.part == "search" and r.cell == cell}
