"""The trajectory report: student and teacher compared over many prompts. An interrupted report resumes.

OUT/trajectory.json             the figures
OUT/trajectory.png              the curves
OUT/trajectory.partial.jsonl    until the report is complete: a line that identifies it, then a line for each batch

For each prompt the report keeps two numbers, its endpoint errors; of everything else it keeps sums over prompts.
"""

# B prompts of a batch, P points of comparison

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from arcflow_jax import schema
from arcflow_jax.console import duration, progress_bar
from arcflow_jax.errors import UserError
from arcflow_jax.evaluate.trajectory.comparison import Comparison
from arcflow_jax.evaluate.trajectory.figures import Grid
from arcflow_jax.evaluate.trajectory.files import Batch, Report
from arcflow_jax.evaluate.trajectory.plot import plot
from arcflow_jax.parallel.processes import is_main, process_index
from arcflow_jax.parallel.together import check_same, from_first, gathered, writing_together
from arcflow_jax.storage.atomic import append, cannot_write, make_directory, write_file
from arcflow_jax.storage.files import digest, parse_json, read_json, read_lines, write_json

REPORT, PARTIAL, PLOT = "trajectory.json", "trajectory.partial.jsonl", "trajectory.png"
FORMAT = "arcflow_jax trajectory report"
VERSION = 1
PRINT_SECONDS = 10  # between printed lines where stderr is no terminal, and so shows no progress bar


@dataclasses.dataclass
class Tally:
    """Sums over the first prompts of a list.

    Attributes:
      sums: by kind and name as in `figures.compare`, each [P].
      student, teacher: for each prompt, the mean square distance to the dense teacher's end state: the student's, and
        that of the teacher in as few steps.
    """

    sums: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    student: list[float] = dataclasses.field(default_factory=list)
    teacher: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def from_batch(cls, sizes: dict[str, dict[str, np.ndarray]], coarse: np.ndarray, count: int) -> Tally:
        """The first `count` prompts of what a `Comparison` returned."""
        sums = jax.tree.map(lambda x: x[:, :count].astype(np.float64).sum(1), sizes)
        return cls(sums, sizes["state"]["total"][-1, :count].tolist(), coarse[:count].tolist())

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> Tally:
        """The tally of a batch. Raises UserError, which begins with `where`, if the values are none."""
        return cls.of(**vars(schema.parse(Batch, values, where, own=True)))

    @classmethod
    def of(cls, sums: Mapping[str, Any], student: Sequence[float], teacher: Sequence[float]) -> Tally:
        """From what `to_json` returns."""
        arrays = {kind: {name: np.array(x) for name, x in group.items()} for kind, group in sums.items()}
        return cls(arrays, list(student), list(teacher))

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"sums": jax.tree.map(np.ndarray.tolist, self.sums)}

    @property
    def count(self) -> int:
        """Number of prompts."""
        return len(self.student)

    def add(self, other: Tally) -> None:
        """Appends the prompts of another tally. Raises UserError if an endpoint error is not finite."""
        for i, errors in enumerate(zip(other.student, other.teacher, strict=True)):
            if not all(map(math.isfinite, errors)):
                raise UserError(f"prompt {self.count + i + 1} gives non-finite values: the weights are damaged")
        self.sums = jax.tree.map(np.add, self.sums, other.sums) if self.sums else other.sums
        self.student += other.student
        self.teacher += other.teacher


def check_identity(path: Path, values: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises UserError unless `values`, read from `path`, belong to the report with this identity."""
    if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path} is not an {FORMAT} of version {VERSION}: choose another --out")
    found = values.get("identity")
    if differing := [name for name in identity if not isinstance(found, dict) or found.get(name) != identity[name]]:
        raise UserError(
            f"{path} belongs to another evaluation, with different {', '.join(differing)}: choose another --out, or "
            "remove it"
        )


def read_report(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """A complete report. Raises UserError if it is damaged or belongs to another evaluation."""
    report = read_json(path)
    if "of" in report:  # its name until version 0.1
        report["identity"] = report.pop("of")
    check_identity(path, report, identity)
    parsed = schema.parse(Report, report, path)
    return report | {"endpoint": schema.unparse(parsed.endpoint)}  # where null may be absent


def read_partial(path: Path, identity: dict[str, Any]) -> Tally:
    """The prompts of an interrupted report; creates the file if there is none.

    Removes a last line that was not written to its end.

    Raises:
      UserError: if the file is damaged elsewhere or belongs to another evaluation.
      OSError: if it cannot be written.
    """
    tally = Tally()
    found = [line for _, line in read_lines(path)] if path.exists() else []
    lines = [line for line in found if line.endswith(b"\n")]
    if not lines:
        header = {"format": FORMAT, "version": VERSION, "identity": identity}
        lines = [json.dumps(header).encode() + b"\n"]
    if lines != found:
        write_file(path, b"".join(lines))
    check_identity(path, parse_json(lines[0], path), identity)
    for number, line in enumerate(lines[1:], 2):
        where = f"{path}, line {number}"
        batch = Tally.from_json(parse_json(line, where), where)
        if tally.sums and shapes(batch) != shapes(tally):
            raise UserError(f"{where} has other points of comparison than the lines before it: remove the file")
        tally.add(batch)
    return tally


def shapes(tally: Tally) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of a tally's sums."""
    return jax.tree.map(np.shape, tally.sums)


def evaluate(comparison: Comparison, prompts: Sequence[str], out: Path) -> dict[str, Any]:
    """Compares student and teacher on all prompts, prints the figures, and returns what it writes to trajectory.json.

    Resumes an interrupted evaluation, with any batch size. A complete one is only shown and plotted again. Several
    processes compare a batch each at a time; the first one alone reads and writes `out`.

    Args:
      prompts: prompt i starts from noise i of the comparison's seed.
      out: directory for figures and plot.

    Raises:
      UserError: if `out` cannot be written or holds another evaluation, or matplotlib is not installed.
    """
    identity = {**comparison.identity, "prompts": len(prompts), "prompts_sha256": digest(prompts)}
    with writing_together(out):
        check_same({"the prompts, the weights or the options": [identity, comparison.batch_size]})
        report = complete_report(comparison, prompts, out, identity)
    cut = sum(gathered(comparison.encode.cut))
    if is_main():
        show(report)
        if cut:
            print(f"{cut} prompts were cut: they had more tokens than the encoder takes", flush=True)
    return report


def complete_report(
    comparison: Comparison, prompts: Sequence[str], out: Path, identity: dict[str, Any]
) -> dict[str, Any]:
    """The report in `out`, made or completed if need be, and plotted. Raises UserError as `evaluate` does."""
    report = from_first(lambda: read_report(out / REPORT, identity) if (out / REPORT).exists() else None)
    if report is None:
        tally = Tally.of(**from_first(lambda: begin(comparison, prompts, out, identity).to_json()))
        with cannot_write(out), append(out / PARTIAL) if is_main() else contextlib.nullcontext() as partial:
            compare_all(comparison, prompts, tally, partial)
        origin = comparison.origin | {"software": f"arcflow_jax {version('arcflow_jax')}"}
        report = {"format": FORMAT, "version": VERSION, "identity": identity, "origin": origin}
        report |= figures(tally, comparison.grid)
    if is_main():
        with cannot_write(out):
            plot(report, out / PLOT)
            write_json(out / REPORT, report)
            (out / PARTIAL).unlink(missing_ok=True)
    return report


def begin(comparison: Comparison, prompts: Sequence[str], out: Path, identity: dict[str, Any]) -> Tally:
    """Makes `out`, and returns the prompts of an interrupted report there. Raises UserError as `evaluate` does."""
    make_directory(out)
    with cannot_write(out):
        tally = read_partial(out / PARTIAL, identity)
    points = {x.shape for group in tally.sums.values() for x in group.values()}
    if tally.count > len(prompts) or points - {comparison.grid.sigma.shape}:
        raise UserError(f"{out / PARTIAL} is damaged: remove it to start again")
    return tally


def compare_all(comparison: Comparison, prompts: Sequence[str], tally: Tally, partial: TextIO | None) -> None:
    """Adds the missing prompts to the tally, a batch in each process at a time; the first writes a line for each batch.

    Args:
      partial: what the first process writes to.
    """
    size, total = comparison.batch_size, len(prompts)
    with progress_bar(transient=True, disable=not is_main()) as bar:
        task = bar.add_task("comparing", total=total, completed=tally.count, text="compiling")
        started = printed = None  # started: prompts and time after the first batch, which compiles
        while tally.count < total:
            for batch in gathered(compare_batch(comparison, prompts, tally.count + size * process_index())):
                if batch is not None:
                    tally.add(Tally.of(**batch))
                    if partial is not None:
                        partial.write(json.dumps(batch) + "\n")
            if partial is not None:
                partial.flush()
            text, now = "", time.monotonic()
            if started is None:
                started = tally.count, now
            else:
                rate = (tally.count - started[0]) / (now - started[1])
                text = f"{rate:.3g} prompts/s, {duration((total - tally.count) / rate)} left"
            bar.update(task, completed=tally.count, text=text)
            if is_main() and bar.disable and (printed is None or now - printed > PRINT_SECONDS or tally.count == total):
                print(", ".join(filter(None, [f"compared {tally.count} of {total} prompts", text])), flush=True)
                printed = now


def compare_batch(comparison: Comparison, prompts: Sequence[str], first: int) -> dict[str, Any] | None:
    """The tally, JSON, of a batch that begins with prompt `first`; None if there is none."""
    size, total = comparison.batch_size, len(prompts)
    if first >= total:
        return None
    # The last batch repeats its last prompt, so that all batches run the same compiled program
    indices = np.minimum(np.arange(first, first + size), total - 1)
    return Tally.from_batch(*comparison([prompts[i] for i in indices], first), min(size, total - first)).to_json()


def figures(tally: Tally, grid: Grid) -> dict[str, Any]:
    """The report's figures, as means over prompts.

    endpoint: for `student` and `teacher` (the teacher in as few steps), each prompt's mean square distance between its
      latents and the dense teacher's, with mean, median and standard error of the mean; `relative` is the student's
      mean over the teacher's.
    segments: for each, `sigma`, where it starts and ends; `velocity`, means over the dense teacher's nodes in it;
      `state`, at its end; both with the parts that `figures.py` defines; `closed_form`, the root mean square of that
      part of the state, relative to the segment's displacement; `curves`, the same parts at every σ.
    """
    segments = []
    means = jax.tree.map(lambda x: x / tally.count, tally.sums)
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
            # At a segment's start the whole error is inherited
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
    student, teacher = statistics(tally.student), statistics(tally.teacher)
    relative = student["mean"] / teacher["mean"] if teacher["mean"] else None
    return {"endpoint": {"student": student, "teacher": teacher, "relative": relative}, "segments": segments}


def statistics(values: Sequence[float]) -> dict[str, Any]:
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
    console, identity = Console(markup=False), report["identity"]
    endpoints = Table("endpoint error", "mean", "± standard error", "median")
    for name in ("student", "teacher"):
        figure = report["endpoint"][name]
        error = "–" if figure.get("standard_error") is None else f"{figure['standard_error']:.2g}"
        label = f"{name}, {identity['steps']} steps"
        endpoints.add_row(label, f"{figure['mean']:.4g}", error, f"{figure['median']:.4g}")
    console.print(endpoints)
    if (relative := report["endpoint"].get("relative")) is not None:
        console.print(f"the student's error is {relative:.3g} times the teacher's error in as many steps")
    parts = ("total", "local", "drift", "cross")
    velocities = Table("velocity error", *parts)
    states = Table("state error at the end", *parts, "closed form")
    for segment in report["segments"]:
        name = " → ".join(f"{sigma:.3f}" for sigma in segment["sigma"])
        errors = [[f"{segment[kind][part]:.4g}" for part in parts] for kind in ("velocity", "state")]
        velocities.add_row(name, *errors[0])
        states.add_row(name, *errors[1], f"{segment['closed_form']:.0e}")
    console.print(velocities, states)
