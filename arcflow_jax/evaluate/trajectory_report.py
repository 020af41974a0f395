"""The trajectory report: student and teacher compared over many prompts, which an interruption does not undo.

OUT/trajectory.json            the figures
OUT/trajectory.png             the curves
OUT/trajectory.partial.json    while it goes on: sums over the prompts so far, and what they are of

Of a prompt two numbers are kept, its endpoint errors, and of everything else sums.
"""

# B prompts of a batch, P points of comparison

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from arcflow_jax.console import duration
from arcflow_jax.errors import UserError
from arcflow_jax.evaluate.comparison import Comparison
from arcflow_jax.evaluate.trajectory import Grid
from arcflow_jax.evaluate.trajectory_plot import plot
from arcflow_jax.storage.files import digest, read_json, write_json

REPORT, PARTIAL, PLOT = "trajectory.json", "trajectory.partial.json", "trajectory.png"
FORMAT = "arcflow_jax trajectory report"
VERSION = 1
SAY_EVERY = 10  # seconds, where no bar can move


@dataclasses.dataclass
class Tally:
    """Sums over the first prompts of a list.

    Attributes:
      sums: by kind and name, as `trajectory.compare` has them, [P] each.
      student, teacher: of each prompt, mean square distance to the dense teacher's data: the student's, and that of
        the teacher itself in as few steps.
    """

    sums: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    student: list[float] = dataclasses.field(default_factory=list)
    teacher: list[float] = dataclasses.field(default_factory=list)

    @property
    def done(self) -> int:
        """How many prompts."""
        return len(self.student)

    def add(self, sizes: dict[str, dict[str, np.ndarray]], coarse: np.ndarray, count: int) -> None:
        """Takes in the first `count` prompts of what a `Comparison` returned. Raises UserError if one is not finite."""
        student = sizes["state"]["total"][-1, :count].tolist()
        for i, errors in enumerate(zip(student, coarse[:count].tolist(), strict=True)):
            if not all(map(math.isfinite, errors)):
                raise UserError(f"prompt {self.done + i + 1} makes values that are not finite: the weights are damaged")
        added = jax.tree.map(lambda x: x[:, :count].astype(np.float64).sum(1), sizes)
        self.sums = jax.tree.map(np.add, self.sums, added) if self.sums else added
        self.student += student
        self.teacher += coarse[:count].tolist()

    def write(self, path: Path, of: dict[str, Any]) -> None:
        sums = jax.tree.map(np.ndarray.tolist, self.sums)
        values = {"sums": sums, "student": self.student, "teacher": self.teacher}
        write_json(path, {"format": FORMAT, "version": VERSION, "of": of, **values})

    @classmethod
    def read(cls, path: Path, of: dict[str, Any]) -> Tally:
        """What was written; empty if there is nothing. Raises UserError if it is of something else."""
        if not path.exists():
            return cls()
        values = read_same(path, of)
        sums = {kind: {name: np.array(x) for name, x in group.items()} for kind, group in values["sums"].items()}
        return cls(sums, values["student"], values["teacher"])


def read_same(path: Path, of: dict[str, Any]) -> dict[str, Any]:
    """A report, or a part of one. Raises UserError if it is of something else."""
    values = read_json(path)
    if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path} is not an {FORMAT} of version {VERSION}: name another --out")
    theirs = values.get("of", {})
    if differing := [name for name in of if theirs.get(name) != of[name]]:
        raise UserError(
            f"{path} is of another evaluation, it differs in {', '.join(differing)}: name another --out, or remove it"
        )
    return values


def evaluate(comparison: Comparison, prompts: Sequence[str], out: Path) -> dict[str, Any]:
    """Compares student and teacher on all prompts, prints the figures, and returns what it writes to trajectory.json.

    Goes on where an interrupted evaluation stopped, whatever its batches were. One that is complete is only shown.

    Args:
      prompts: prompt i has the noise i of the comparison's seed.
      out: the directory for figures and plot.

    Raises:
      UserError: if `out` cannot be written or holds another evaluation, or matplotlib is missing.
    """
    of = {**comparison.of, "prompts": len(prompts), "prompts_sha256": digest(prompts)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / REPORT).exists():
            report = read_same(out / REPORT, of)
        else:
            tally = Tally.read(out / PARTIAL, of)
            run(comparison, prompts, tally, out / PARTIAL, of)
            origin = comparison.origin | {"software": f"arcflow_jax {version('arcflow_jax')}"}
            measured = figures(tally, comparison.grid)
            report = {"format": FORMAT, "version": VERSION, "of": of, "origin": origin, **measured}
        plot(report, out / PLOT)
        write_json(out / REPORT, report)
        (out / PARTIAL).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None
    show(report)
    if comparison.encode.cut:
        print(f"{comparison.encode.cut} prompts had more tokens than the encoder takes, and were cut", flush=True)
    return report


def run(comparison: Comparison, prompts: Sequence[str], tally: Tally, partial: Path, of: dict[str, Any]) -> None:
    """Adds to the tally the prompts that it lacks, and writes it to `partial` after each batch."""
    batch, total = comparison.batch_size, len(prompts)
    console = Console(stderr=True)
    columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[text]}"))
    with Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=console, transient=True) as bar:
        task = bar.add_task("comparing", total=total, completed=tally.done, text="compiling")
        counted = said = None  # prompts and time from which the rate is taken: the first batch compiles
        while tally.done < total:
            first = tally.done
            # The last batch is filled up, so that it is the same compiled program
            indices = np.minimum(np.arange(first, first + batch), total - 1)
            tally.add(*comparison([prompts[i] for i in indices], first), min(batch, total - first))
            tally.write(partial, of)
            text, now = "", time.monotonic()
            if counted is None:
                counted = tally.done, now
            else:
                rate = (tally.done - counted[0]) / (now - counted[1])
                text = f"{rate:.3g} prompts/s, {duration((total - tally.done) / rate)} left"
            bar.update(task, completed=tally.done, text=text)
            if not console.is_terminal and (said is None or now - said > SAY_EVERY or tally.done == total):
                print(", ".join(filter(None, [f"compared {tally.done} of {total} prompts", text])), flush=True)
                said = now


def figures(tally: Tally, grid: Grid) -> dict[str, Any]:
    """The report's figures; means over prompts.

    endpoint: of `student` and `teacher` (that is the teacher in as few steps), each prompt's mean square distance of
      the latents to the dense teacher's, and their mean, median and the mean's standard error; `relative`, the one
      mean over the other.
    segments: of each, `sigma` where it starts and ends; `velocity`, means over the dense teacher's nodes in it;
      `state`, at its end; both with the parts of `trajectory`; `closed_form`, the root mean square of that part of the
      state, relative to the segment's displacement; `curves`, the same parts at every σ.
    """
    segments = []
    means = jax.tree.map(lambda x: x / tally.done, tally.sums)
    inherited = 0.0
    for segment in range(grid.steps):
        here = grid.segment == segment
        velocity = {name: x[here & grid.at_node] for name, x in means["velocity"].items()}
        state = {name: x[here] for name, x in means["state"].items()}
        end = {name: float(x[-1]) for name, x in state.items()}
        curves = {
            "velocity": {
                "sigma": grid.sigma[here & grid.at_node].tolist(),
                **jax.tree.map(np.ndarray.tolist, velocity),
            },
            # Where a segment starts its error is what it inherits
            "state": {"sigma": [float(grid.spans.src[segment]), *grid.sigma[here].tolist()]}
            | {name: [inherited * (name in ("total", "drift")), *x.tolist()] for name, x in state.items()},
        }
        segments.append(
            {
                "sigma": [float(sigma[segment]) for sigma in grid.spans],
                "velocity": {name: float(x.mean()) for name, x in velocity.items()},
                "state": end,
                "closed_form": math.sqrt(end["closed_form"] / end["displacement"]) if end["displacement"] else 0.0,
                "curves": curves,
            }
        )
        inherited = end["total"]
    student, teacher = spread(tally.student), spread(tally.teacher)
    relative = student["mean"] / teacher["mean"] if teacher["mean"] else None
    return {"endpoint": {"student": student, "teacher": teacher, "relative": relative}, "segments": segments}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, median, standard error of the mean (None for a single value), and the values themselves."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {
        "mean": float(np.mean(values)),
        "median": float(np.median(values)),
        "standard_error": error,
        "each": list(values),
    }


def show(report: dict[str, Any]) -> None:
    """Prints the figures as tables."""
    console, of = Console(), report["of"]
    endpoints = Table("endpoint error", "mean", "± standard error", "median")
    for name, label in (("student", "student"), ("teacher", "teacher")):
        figure = report["endpoint"][name]
        error = "–" if figure["standard_error"] is None else f"{figure['standard_error']:.2g}"
        endpoints.add_row(f"{label}, {of['steps']} steps", f"{figure['mean']:.4g}", error, f"{figure['median']:.4g}")
    console.print(endpoints)
    if (relative := report["endpoint"]["relative"]) is not None:
        console.print(f"the student makes {relative:.3g} of the error that the teacher makes in as many steps")
    parts = ("total", "local", "drift", "cross")
    velocities = Table("velocity error", *parts)
    states = Table("state error, end", *parts, "closed form")
    for segment in report["segments"]:
        name = " → ".join(f"{sigma:.3f}" for sigma in segment["sigma"])
        errors = [[f"{segment[kind][part]:.4g}" for part in parts] for kind in ("velocity", "state")]
        velocities.add_row(name, *errors[0])
        states.add_row(name, *errors[1], f"{segment['closed_form']:.0e}")
    console.print(velocities, states)
