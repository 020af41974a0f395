"""Writes the tables and figures of a study beside its results."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from arcflow_jax.errors import UserError
from arcflow_jax.storage.atomic import cannot_write, write_file
from benchmarks.methods import figures
from benchmarks.methods.results import Result
from benchmarks.methods.tables import places, tables


def write(folder: Path, results: Sequence[Result]) -> None:
    """Writes tables.md, overview.png and nfe-N-shift-S.png. Raises UserError if there are no results or no place."""
    if not places(results):
        raise UserError(f"{folder} has no results yet: run without --report first")
    with cannot_write(folder):
        write_file(folder / "tables.md", tables(results).encode())
        write_file(folder / "overview.png", png(figures.overview(results)))
        for nfe, shift in places(results):
            write_file(folder / f"nfe-{nfe}-shift-{shift:g}.png", png(figures.place(results, nfe, shift)))
    print(f"wrote tables.md and figures of {len(results)} results to {folder}")


def png(drawing: Figure) -> bytes:
    """A figure as a file."""
    file = io.BytesIO()
    drawing.savefig(file, dpi=80)
    return file.getvalue()
