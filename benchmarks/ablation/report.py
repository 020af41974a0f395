"""The table and the figure of a study, from the results that are finished."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from arcflow_jax.demo import report as demo
from arcflow_jax.demo.evaluate import BATCH
from arcflow_jax.errors import UserError
from arcflow_jax.storage.atomic import cannot_write
from benchmarks.ablation.cells import (
    CELLS,
    COMPARED,
    METHODS,
    MODES,
    NFES,
    PARTS,
    RATES,
    SECTIONS,
    SETTINGS,
    cell,
    modes,
    nfe,
)
from benchmarks.ablation.study import DIVERSE, EULER, Result, Study, teacher

COLOURS = {**demo.COLOURS, "legendre": "#0f766e", "teacher": "#1c1917"}
MARKERS = {"linear": "s", "arcflow": "o", "legendre": "^", "teacher": "D"}
LABELS = {"linear": "linear", "arcflow": "momentum (ArcFlow)", "legendre": "Legendre", "teacher": "teacher, Euler"}
COLUMNS = (
    *("", "seeds", "endpoint error", "Fréchet distance", "prompt agreement", "diversity"),
    *("s per training step", "training, s"),
)


def write(study: Study) -> None:
    """Writes table.md and ablation.png. Raises UserError if nothing is finished or they cannot be written."""
    finished = Finished.in_study(study)
    if not finished.results:
        raise UserError(f"{study.out} contains no finished results: run without --report first")
    texts = [heading(study), table(finished), "Endpoint error during training:", training_table(finished)]
    with cannot_write(study.out):
        (study.out / "table.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        figure(finished).savefig(study.out / "ablation.png", dpi=110)
    print(f"wrote {study.out / 'table.md'} and {study.out / 'ablation.png'} from {len(finished.results)} results")


@dataclasses.dataclass(frozen=True)
class Finished:
    """The finished results of a study.

    Attributes:
      steps: training steps of a whole run.
      guidances: teacher guidance scales used for distillation, the most frequent first.
    """

    results: list[Result]
    steps: int
    guidances: list[float]

    @classmethod
    def in_study(cls, study: Study) -> Finished:
        settings = [study.recipe(cell("arcflow", setting)) for setting in ("", *SETTINGS)]
        return cls(study.results(), study.steps, list(dict.fromkeys(recipe.guidance for recipe in settings)))

    def seeds(self, cell: str, steps: int | None = None) -> list[Result]:
        """A cell's results for all seeds, after this many training steps; by default at the end."""
        wanted = (0, self.steps) if steps is None else (steps,)
        return [result for result in self.results if result.cell == cell and result.steps in wanted]

    def stops(self, cell: str) -> list[int]:
        """The training steps after which a cell was evaluated."""
        return sorted({result.steps for result in self.results if result.cell == cell})

    def sections(self) -> dict[str, list[str]]:
        """Rows of the table, by title: the teachers, `SECTIONS`, and all other results."""
        teachers = {f"teacher, Euler, guidance {g:g}": [teacher(n, g) for n in EULER] for g in self.guidances}
        listed = teachers | SECTIONS
        known = {name for names in listed.values() for name in names}
        others = {result.cell for result in self.results if result.steps == self.steps} - known
        found = {title: [name for name in names if self.seeds(name)] for title, names in listed.items()}
        return {title: names for title, names in (found | {"others": sorted(others)}).items() if names}


def error(result: Result) -> float:
    return result.figures["endpoint_error"]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is 0 for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


# The table


def heading(study: Study) -> str:
    usual = study.recipe("arcflow")
    machine = f"{os.cpu_count()} {platform.machine()} cores, jax {jax.__version__}, {datetime.date.today()}"
    return (
        f"Runs of {study.steps} training steps at batch {usual.batch}, evaluated on {study.prompts} prompts with the "
        f"same noise for all; {machine}. A row is a variant of `configs/tiny_ablation.py`, with NFE "
        f"{usual.distillation.nfe}, timestep shift {usual.distillation.shift:g} and guidance {usual.guidance:g} unless "
        "its name says otherwise. Mean ± standard deviation over seeds 0, 1, …, where there are several. Endpoint "
        f"error: against the teacher's {EULER[-1]} Euler steps at the same guidance. Diversity: the mean distance, 1 − "
        f"cosine of the judge's features, over the pairs of {BATCH} images of a prompt, relative to the teacher's in "
        f"{EULER[-1]} steps; {min(DIVERSE, study.prompts)} prompts. Seconds exclude compilation."
    )


def table(finished: Finished) -> str:
    """A Markdown table with a row per cell, in sections."""
    rows = [row(COLUMNS), row(["---"] * len(COLUMNS))]
    for title, names in finished.sections().items():
        rows.append(row([f"**{title}**"] + [""] * (len(COLUMNS) - 1)))
        rows += [row([name.partition("-guidance")[0], *figures_of(finished.seeds(name))]) for name in names]
    return "\n".join(rows)


def row(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"


def figures_of(results: list[Result]) -> list[str]:
    """The columns of a row, from all seeds of a cell."""

    def value(read: Callable[[Result], float], digits: int) -> str:
        mean, spread = mean_and_spread([read(result) for result in results])
        return f"{mean:.{digits}f} ± {spread:.{digits}f}" if len(results) > 1 else f"{mean:.{digits}f}"

    trained, known = bool(results[0].steps), all("diversity" in result.figures for result in results)
    return [
        str(len(results)) if trained else "–",
        value(error, 4),
        value(lambda result: result.figures["frechet_distance"], 2),
        value(lambda result: 100 * result.figures["prompt_agreement"], 1) + " %",
        value(lambda result: result.figures["diversity"], 3) if known else "–",
        f"{statistics.mean(result.seconds for result in results):.3f}" if trained else "–",
        f"{point(results).seconds:.0f}" if trained else "–",
    ]


def training_table(finished: Finished) -> str:
    """A row per cell that was evaluated during training: endpoint error, and seconds of training so far."""
    cells = [name for name in CELLS if name in COMPARED and finished.stops(name)]
    stops = sorted({stop for cell in cells for stop in finished.stops(cell)})
    rows = [row(["", *(f"{stop} steps" for stop in stops)]), row(["---"] * (len(stops) + 1))]
    for name in cells:
        points = {stop: point(finished.seeds(name, stop)) for stop in stops if finished.seeds(name, stop)}
        rows.append(row([name, *(f"{p.error:.4f}, {p.seconds:.0f} s" if (p := points.get(s)) else "" for s in stops)]))
    return "\n".join(rows)


# The figure


class Point(NamedTuple):
    """A cell over all its seeds."""

    error: float
    spread: float
    seconds: float


def point(results: list[Result]) -> Point:
    seconds = statistics.mean(result.seconds * result.steps for result in results)
    return Point(*mean_and_spread([error(result) for result in results]), seconds)


def figure(finished: Finished) -> Figure:
    """Endpoint error, with a panel per comparison."""
    drawing = Figure(figsize=(14, 8.5), layout="constrained")
    drawing.suptitle("Endpoint error against the teacher's 50 steps from the same noise: lower is better", fontsize=14)
    (nfe_axes, two_axes, one_axes), (modes_axes, parts_axes, settings_axes) = drawing.subplots(2, 3)
    draw_nfe(nfe_axes, finished)
    for axes, count in ((two_axes, 2), (one_axes, 1)):
        draw_training(axes, finished, count)
    draw_modes(modes_axes, finished)
    draw_parts(parts_axes, finished)
    draw_settings(settings_axes, finished)
    for axes in drawing.axes:
        axes.set_visible(axes.has_data())
    handles, labels = nfe_axes.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=12)
    return drawing


def draw_nfe(axes: Axes, finished: Finished) -> None:
    for method in METHODS:
        draw_line(axes, method, {n: finished.seeds(cell(method, nfe(n))) for n in NFES})
    guidance = finished.guidances[0]
    draw_line(axes, "teacher", {n: finished.seeds(teacher(n, guidance)) for n in EULER[:-1]})
    axes.set(title="lower NFE", xlabel="NFE", xscale="log")
    plain_ticks(axes, [*NFES, EULER[-2]])
    logarithmic(axes)


def draw_training(axes: Axes, finished: Finished, count: int) -> None:
    for method in METHODS:
        name = cell(method, nfe(count))
        points = {s: finished.seeds(name, s) for s in finished.stops(name)}
        draw_line(axes, method, {point(results).seconds: results for results in points.values()})
    axes.set(title=f"training time, NFE {count}", xlabel="seconds without compilation")
    axes.set_xlim(left=0)
    logarithmic(axes)


def draw_modes(axes: Axes, finished: Finished) -> None:
    for method, counts in MODES.items():
        draw_line(axes, method, {k: finished.seeds(cell(method, modes(method, k))) for k in counts})
    draw_line(axes, "linear", {1: finished.seeds("linear")})
    axes.set(title="more modes or terms, NFE 2", xlabel="modes of the mixture, terms of the series", xscale="log")
    plain_ticks(axes, [1, *MODES["legendre"], *MODES["arcflow"][2:]])
    axes.set_ylim(bottom=0)


def draw_parts(axes: Axes, finished: Finished) -> None:
    """Points are changed recipes; lines with their spread are the unchanged recipes."""
    points = {part: point(found) for part in PARTS if (found := finished.seeds(cell("arcflow", part)))}
    if not points:
        return
    for part, p in points.items():
        style = {"color": COLOURS["arcflow"], "marker": MARKERS["arcflow"], "capsize": 3}
        axes.errorbar(p.error, part.replace("-", " "), xerr=p.spread, **style)
    for method in ("linear", "arcflow"):
        if found := finished.seeds(method):
            p = point(found)
            axes.axvline(p.error, color=COLOURS[method])
            axes.axvspan(p.error - p.spread, p.error + p.spread, color=COLOURS[method], alpha=0.2, linewidth=0)
    axes.margins(y=0.1)
    axes.invert_yaxis()
    axes.grid(alpha=0.25)
    axes.set(title="a change in ArcFlow's recipe, NFE 2", xlabel="endpoint error; lines: unchanged recipes")


def draw_settings(axes: Axes, finished: Finished) -> None:
    settings = ("", *RATES, *SETTINGS)
    for i, method in enumerate(METHODS):
        for j, setting in enumerate(settings):
            if found := finished.seeds(cell(method, setting)):
                p = point(found)
                axes.bar(j + 0.27 * (i - 1), p.error, 0.25, yerr=p.spread or None, color=COLOURS[method])
    axes.set_xticks(range(len(settings)), ["unchanged", *(name.replace("-", "\n", 1) for name in settings[1:])])
    axes.set(title="learning rate, timestep shift, guidance, NFE 2", ylabel="endpoint error")


def draw_line(axes: Axes, name: str, results: Mapping[float, list[Result]]) -> None:
    """Means and spreads of the finished results, by x."""
    points = {x: point(found) for x, found in results.items() if found}
    if not points:
        return
    means, spreads = [p.error for p in points.values()], [p.spread for p in points.values()]
    style = {"color": COLOURS[name], "marker": MARKERS[name], "linestyle": "--" if name == "teacher" else "-"}
    axes.errorbar(list(points), means, yerr=spreads, capsize=3, label=LABELS[name], **style)
    axes.set_ylabel("endpoint error")
    axes.grid(alpha=0.25, which="both")


def plain_ticks(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def logarithmic(axes: Axes) -> None:
    """A logarithmic scale with plain numbers as labels."""
    if not axes.has_data():
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
