"""The tables of a study, in Markdown: pure functions of its results."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks.methods import search
from benchmarks.methods.protocol import METHODS, SCHEDULES, Cell
from benchmarks.methods.results import Part, Result, errors

MEASURES = ("endpoint error", "Fréchet distance", "prompt agreement", "diversity")


def tables(results: Sequence[Result]) -> str:
    """All tables: the teacher; then, for each NFE and shift, methods, their parts of the error, and their training."""
    texts = ["## Teacher", teachers(results)]
    for nfe, shift in places(results):
        texts += [f"## NFE {nfe}, shift {shift:g}", students(results, nfe, shift)]
        texts += [make(results, nfe, shift) for make in (training, traced, schedules)]
    return "\n\n".join(filter(None, texts)) + "\n"


def places(results: Iterable[Result]) -> list[tuple[int, float]]:
    """NFE and shift of all students."""
    return sorted({(result.nfe, result.shift) for result in results if result.part != "teacher"})


def teachers(results: Iterable[Result]) -> str:
    """The teacher in few Euler steps."""
    found = sorted((result for result in results if result.part == "teacher"), key=lambda result: result.nfe)
    return markdown(["Euler steps", *titles(found)], [[str(r.nfe), *measures([r])] for r in found])


def students(results: Sequence[Result], nfe: int, shift: float) -> str:
    """Each method at its best, and with the published recipe: a row each; methods that are only searched have none."""
    head = ["", "seeds", "learning rate", "batch", "schedule", "training steps", "teacher calls", "training, s"]
    rows = []
    for method, part in itertools.product(METHODS, ("best", "published")):
        found = shown(results, Cell(method, nfe, shift), part)
        if found:
            first = found[0]
            name = method if part == "best" else f"{method}, published recipe"
            row = [name, str(len(found)), f"{first.setting.rate:g}", str(first.setting.batch), first.setting.schedule]
            seconds = statistics.mean(result.seconds * result.steps for result in found)
            rows.append([*row, str(first.steps), f"{first.calls:,}", f"{seconds:.0f}", *measures(found)])
    return markdown([*head, *titles(results)], rows) if rows else "Not measured on the test prompts yet."


def shown(results: Sequence[Result], cell: Cell, part: Part) -> list[Result]:
    """What the table shows of a cell, a result for each seed: its best setting at its stop, or the published one."""
    found = [result for result in results if (result.cell, result.part) == (cell, part)]
    stop = 1.0
    if part == "best":
        known = errors(results, cell)
        if not search.whole(known):
            return []
        setting, stop = search.best(known)
        found = [result for result in found if result.setting == setting]
    return [result for result in found if result.share == stop]


def training(results: Sequence[Result], nfe: int, shift: float) -> str:
    """Loss and endpoint error during training, of each method at its best: means over seeds."""
    rows, shares = [], sorted({r.share for r in results if (r.part, r.nfe, r.shift) == ("best", nfe, shift)})
    for method in METHODS:
        setting = {result.setting for result in shown(results, Cell(method, nfe, shift), "best")}
        stops = {
            share: [
                result
                for result in results
                if (result.part, result.cell, result.share) == ("best", Cell(method, nfe, shift), share)
                and result.setting in setting
            ]
            for share in shares
        }
        if any(stops.values()):
            cells = [
                f"{mean(found, lambda r: r.figures['endpoint_error'], 4)}; {mean(found, lambda r: r.loss, 3)}"
                for found in stops.values()
            ]
            rows.append([method, *cells])
    return markdown(["error; loss", *stops_of(shares)], rows) if rows else ""


def traced(results: Sequence[Result], nfe: int, shift: float) -> str:
    """The parts of the state's error at the end of each segment, from the trajectory report of the first seed."""
    rows = []
    for method, part in itertools.product(METHODS, ("best", "published")):
        for result in shown(results, Cell(method, nfe, shift), part):
            for i, segment in enumerate(result.figures.get("segments") or [], 1):
                name = method if part == "best" else f"{method}, published recipe"
                sigmas = " to ".join(f"{sigma:.3f}" for sigma in segment["sigma"])
                values = [f"{segment[kind][name]:.4g}" for kind in ("velocity", "state") for name in ("local", "drift")]
                rows.append([name, f"{i}: σ {sigmas}", *values])
    head = ["", "segment", "velocity: local", "velocity: drift", "state: local", "state: drift"]
    return markdown(head, rows) if rows else ""


def schedules(results: Sequence[Result], nfe: int, shift: float) -> str:
    """Each method's best setting with every schedule of the teacher's share.

    The velocity error is that in the first segment, on the teacher's own trajectory.
    """
    here = [result for result in results if (result.part, result.nfe, result.shift) == ("schedules", nfe, shift)]
    shares, rows = sorted({result.share for result in here}), []
    for method, schedule in itertools.product(METHODS, SCHEDULES):
        found = {r.share: r for r in here if (r.method, r.setting.schedule) == (method, schedule)}
        if found:
            cells = [
                f"{mean([r], lambda r: r.error, 4)}; {mean([r], lambda r: r.loss, 3)}; "
                f"{r.figures['segments'][0]['velocity']['local']:.3f}"
                for r in (found[share] for share in shares if share in found)
            ]
            rows.append([f"{method}, {schedule}", *cells])
    head = ["schedule: error; loss; velocity error", *stops_of(shares)]
    return markdown(head, rows) if rows else ""


def stops_of(shares: Iterable[float]) -> list[str]:
    """The stops as column titles."""
    return [f"{share:g} of the budget" for share in shares]


def titles(results: Sequence[Result]) -> list[str]:
    """The measures' names; what the first attribute of the world is, is a measure too."""
    attribute = next((first_attribute(result) for result in results if result.part != "search"), "")
    return [*MEASURES[:3], attribute, MEASURES[3]]


def first_attribute(result: Result) -> str:
    """The name of the world's first attribute, such as emoji."""
    return next(iter(result.figures["prompt_agreement_by_attribute"]))


def measures(results: Sequence[Result]) -> list[str]:
    """The columns `titles`: mean ± standard deviation over seeds."""
    return [
        mean(results, lambda result: result.figures["endpoint_error"], 4),
        mean(results, lambda result: result.figures["frechet_distance"], 2),
        mean(results, lambda result: 100 * result.figures["prompt_agreement"], 1) + " %",
        mean(results, lambda r: 100 * r.figures["prompt_agreement_by_attribute"][first_attribute(r)], 1) + " %",
        mean(results, lambda result: result.figures["diversity"], 3),
    ]


def mean(results: Sequence[Result], read: Callable[[Result], float | None], digits: int) -> str:
    """Mean ± sample standard deviation of a figure, without the latter if there is one result only; "" if none."""
    values = [read(result) for result in results]
    if not values:
        return ""
    if None in values:
        return "not finite"
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
