"""The trajectory report's plot: velocity and state errors over σ, and the parts that they consist of."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from arcflow_jax.data.prompts import library
from arcflow_jax.storage.atomic import write_file

LINES = {  # label, colour, style
    "total": ("total", "#1c1917", "-"),
    "local": ("local: from the teacher's own state", "#c2410c", "-"),
    "drift": ("drift: inherited from earlier segments", "#0369a1", "-"),
    "cross": ("cross: product of the two", "#a8a29e", ":"),
}
TITLES = {"velocity": "velocity error", "state": "state error"}


def check_library() -> None:
    """Raises UserError if matplotlib is not installed."""
    library("matplotlib", "plots", extra="eval")


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws a report (see `report.figures`) as a PNG, which appears whole or not at all. Raises OSError."""
    figure_module = library("matplotlib.figure", "plots", extra="eval")
    figure = figure_module.Figure(figsize=(8, 7), dpi=150, layout="constrained")
    rows = figure.subplots(2, sharex=True)
    for axes, (kind, title) in zip(rows, TITLES.items(), strict=True):
        for i, segment in enumerate(report["segments"]):
            curve = segment["curves"][kind]
            for name, (label, colour, style) in LINES.items():
                axes.plot(curve["sigma"], curve[name], style, color=colour, label=None if i else label)
            if i:
                axes.axvline(segment["sigma"][0], color="#d6d3d1", linewidth=1, zorder=0)
        axes.axhline(0, color="#d6d3d1", linewidth=1, zorder=0)
        axes.set_ylabel(f"{title}, mean square")
        axes.spines[["top", "right"]].set_visible(False)
    rows[1].legend(frameon=False, loc="upper left")
    rows[1].set_xlabel("σ: from noise (1) to data (0)")
    rows[1].invert_xaxis()
    identity, endpoint = report["identity"], report["endpoint"]
    error = endpoint["student"]["standard_error"]
    figure.suptitle(
        f"student in {identity['steps']} steps against teacher in {identity['teacher_steps']}: endpoint error "
        f"{endpoint['student']['mean']:.3g}{'' if error is None else f' ± {error:.1g}'} "
        f"over {identity['prompts']} prompts",
        fontsize="medium",
    )
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    write_file(path, encoded.getvalue())
