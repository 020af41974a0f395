"""The figures of a study: one over all cells, and one for each NFE and shift."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.methods.protocol import EULER, METHODS, SCHEDULES, Cell
from benchmarks.methods.results import Result
from benchmarks.methods.tables import places, shown

PALETTE = ("#64748b", "#f59e0b", "#c2410c", "#0ea5e9", "#0f766e", "#7c3aed", "#be185d", "#4d7c0f")
COLOURS = dict(zip(METHODS, PALETTE, strict=False))
LINES = dict(zip(SCHEDULES, (":", "-", "-.", "--"), strict=True))


def overview(results: Sequence[Result]) -> Figure:
    """Endpoint error by NFE, a panel for each shift: each method at its best, and the teacher's Euler steps."""
    nfes, shifts = (sorted(set(each)) for each in zip(*places(results), strict=True))
    drawing = Figure(figsize=(5 * len(shifts), 4.5), layout="constrained")
    for axes, shift in zip(drawing.subplots(1, len(shifts), squeeze=False, sharey=True)[0], shifts, strict=True):
        for method in METHODS:
            for part, style in (("best", "-"), ("published", ":")):
                found = {nfe: shown(results, Cell(method, nfe, shift), part) for nfe in nfes}
                label = method if part == "best" else f"{method}, published recipe"
                spread(axes, found, label, color=COLOURS[method], linestyle=style, marker="o")
        teacher = {r.nfe: [r] for r in results if r.part == "teacher" and r.nfe in EULER[:-1]}
        spread(axes, teacher, "teacher, Euler steps", color="#1c1917", linestyle="--", marker="D")
        axes.set(title=f"timestep shift {shift:g}", xlabel="NFE", xscale="log", yscale="log")
        plain(axes)
        axes.set_xticks(sorted({*nfes, *EULER[:-1]}))
    drawing.axes[0].set_ylabel("endpoint error, test prompts")
    legend(drawing)
    return drawing


def place(results: Sequence[Result], nfe: int, shift: float) -> Figure:
    """One NFE and shift: what the search found, training, and cost in teacher calls and in seconds."""
    drawing = Figure(figsize=(16, 9), layout="constrained")
    drawing.suptitle(f"NFE {nfe}, timestep shift {shift:g}")
    (rates, error, loss), (calls, seconds, parts) = drawing.subplots(2, 3)
    here = [result for result in results if (result.nfe, result.shift) == (nfe, shift)]
    draw_rates(rates, here)
    for method in METHODS:
        cell = Cell(method, nfe, shift)
        settings = {result.setting for result in shown(results, cell, "best")}
        best = [r for r in here if (r.part, r.method) == ("best", method) and r.setting in settings]
        stops = {count: [r for r in best if r.calls == count] for count in sorted({r.calls for r in best})}
        spread(error, stops, method, color=COLOURS[method], marker="o")
        spread(loss, stops, method, lambda result: result.loss, color=COLOURS[method], marker="o")
        searched = [r for r in here if (r.part, r.method) == ("search", method)]
        stairs(calls, searched, lambda result: result.calls, color=COLOURS[method], label=method)
        stairs(seconds, searched, lambda result: result.seconds * result.steps, color=COLOURS[method], label=method)
    draw_parts(parts, results, nfe, shift)
    error.set(title="training, at its best", xlabel="teacher calls", ylabel="endpoint error, test prompts")
    loss.set(title="training, at its best", xlabel="teacher calls", ylabel="loss")
    calls.set(title="cost: the best of all settings tried", xlabel="teacher calls", ylabel="endpoint error, validation")
    seconds.set(title="cost: the best of all settings tried", xlabel="seconds of training", ylabel=calls.get_ylabel())
    for axes in (rates, error, loss, calls, seconds):
        if axes.has_data():
            axes.set(xscale="log", yscale="log")
            plain(axes)
    for axes in drawing.axes:
        axes.set_visible(axes.has_data())
    legend(drawing)
    return drawing


def draw_rates(axes: Axes, results: Sequence[Result]) -> None:
    """The least error at any stop by learning rate: a line for each method, batch and schedule of two rates or more."""
    searched = [result for result in results if result.part == "search"]
    for method in METHODS:
        least: dict[tuple[int, str], dict[float, float]] = {}
        for result in searched:
            if result.method == method:
                line = least.setdefault((result.setting.batch, result.setting.schedule), {})
                line[result.setting.rate] = min(line.get(result.setting.rate, result.error), result.error)
        for (_, schedule), line in least.items():
            points = sorted(line.items())
            axes.plot(*zip(*points, strict=True), LINES[schedule], marker=".", color=COLOURS[method])
    styles = zip(SCHEDULES, ("dotted", "solid", "dash-dot", "dashed"), strict=True)
    title = "search; schedule " + ", ".join(f"{name} {style}" for name, style in styles)
    axes.set(title=title, xlabel="learning rate", ylabel="least endpoint error, validation")


def draw_parts(axes: Axes, results: Sequence[Result], nfe: int, shift: float) -> None:
    """The state's error at the end, and its parts, from the trajectory report."""
    for i, method in enumerate(METHODS):
        for result in shown(results, Cell(method, nfe, shift), "best"):
            if segments := result.figures.get("segments"):
                for j, part in enumerate(("total", "local", "drift")):
                    axes.bar(
                        i + 0.27 * (j - 1), segments[-1]["state"][part], 0.25, color=COLOURS[method], alpha=1 - 0.3 * j
                    )
    axes.set_xticks(range(len(METHODS)), METHODS, rotation=30, horizontalalignment="right")
    axes.set(title="state at the end: error in all, local, drift", ylabel="mean square")


def spread(
    axes: Axes,
    results: dict[int, list[Result]],
    label: str,
    read: Callable[[Result], float | None] = lambda result: result.error,
    **style: object,
) -> None:
    """Means and standard deviations over seeds, by x, of figures that are finite."""
    values = {x: [value for r in found if (value := read(r)) is not None] for x, found in results.items()}
    values = {x: each for x, each in values.items() if each and all(map(math.isfinite, each))}
    if values:
        means = [statistics.mean(each) for each in values.values()]
        spreads = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values.values()]
        axes.errorbar(list(values), means, yerr=spreads, capsize=3, label=label, **style)


def stairs(axes: Axes, results: Sequence[Result], cost: Callable[[Result], float], **style: object) -> None:
    """The least error that any setting has at this cost or less."""
    points = frontier([(cost(result), result.error) for result in results])
    if points:
        axes.step(*zip(*points, strict=True), where="post", marker=".", **style)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, error), those that no cheaper one matches, by cost."""
    found: list[tuple[float, float]] = []
    for cost, error in sorted(points):
        if not found or error < found[-1][1]:
            found.append((cost, error))
    return found


def plain(axes: Axes) -> None:
    """A grid, and plain numbers on logarithmic axes."""
    axes.grid(alpha=0.25, which="both")
    for axis, subs in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 1.5, 2, 3, 4, 6, 8))):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def legend(drawing: Figure) -> None:
    """One legend of all panels."""
    labels = {
        label: handle for axes in drawing.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = int(drawing.get_figwidth() / 2.5)  # a name takes at most so many inches
    drawing.legend(labels.values(), labels, loc="outside lower center", ncols=columns, frameon=False)
