"""Runs the cases of a report one after the other, and prints what they would take."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import arcflow_jax
from arcflow_jax.compile_report.chips import GIB, chip
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.parallel.mesh import MESH_AXES

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYTHONPATH": os.pathsep.join([str(Path(arcflow_jax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
      program: one of `programs.PROGRAMS`.
      config, overrides: the recipe.
      topology: e.g. "v5p:2x2x1", or "v5p:2x2x1*2" for two such slices.
      mesh: sizes of the axes data, fsdp, tensor, sequence; -1 takes what is left.
      batch: pictures, on all devices together.
    """

    program: str
    config: str
    overrides: tuple[str, ...]
    topology: str
    mesh: tuple[int, ...]
    batch: int


def report(cases: Sequence[Case], limit: float, out: Path | None) -> list[dict[str, Any]]:
    """Compiles the cases, prints a table and, if `out` is given, writes the rows there as JSON.

    A program that takes too much memory or time, or that the compiler fails on, is a row as well.

    Args:
      limit: seconds that a case may take.

    Raises:
      UserError: before any is compiled, if a topology is unknown or the compiler is not installed; if a recipe, a
        model or a mesh does not fit.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, the compiler for TPUs, is not installed: pip install libtpu, or arcflow_jax[tpu]")
    for case in cases:
        chip(case.topology)
    ask(cases, limit, compiling=False)
    rows = []
    console = Console(stderr=True)
    for case in cases:
        with console.status(f"compiling the {case.program} for {case.topology}"):
            rows.append(row(case, ask([case], limit, compiling=True)))
        if out is not None:
            write(out, rows)  # after each, because a case can take long
    table(rows)
    return rows


def ask(cases: Sequence[Case], limit: float, *, compiling: bool) -> dict[str, Any]:
    """What a child process finds of the cases: nothing, or of a single one what compiling it says.

    Raises:
      UserError: that the child raised, because a case does not fit.
    """
    request = {"cases": [dataclasses.asdict(case) for case in cases], "compile": compiling}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "arcflow_jax.compile_report.child"],
            input=json.dumps(request),
            env={k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"status": f"not done in {limit:.0f} s"}
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"status": "failed", "detail": one_line(RuntimeError(last[0]))}
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def row(case: Case, answer: dict[str, Any]) -> dict[str, Any]:
    """A case with its answer, the least time that the chip's peak rates allow, and that of half the matrix rate.

    The least is the longer of the matrix operations at the peak matrix rate, evenly over the devices, and of reading
    the arguments from memory as often as the program has to.
    """
    of = chip(case.topology)
    found = dataclasses.asdict(case) | {"capacity": of.memory} | answer
    if answer["status"] == "compiled":
        compute = answer["flops"] / answer["devices"] / of.flops
        memory = answer["passes"] * answer["arguments"] / of.bandwidth
        found["roofline"] = {
            "seconds": max(compute, memory),
            "compute": compute,
            "memory": memory,
            "half_peak": 2 * compute,
        }
    return found


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows; sizes are a device's."""
    grid = Table(title="GiB a device; communication in one run, results on one device")
    sizes = ("arguments", "temporaries", "peak", "of", "TFLOP")
    for name in ("topology", "mesh", *sizes, "roofline s", "s at 50 %", "collectives"):
        grid.add_column(name, justify="left" if name in ("topology", "mesh", "collectives") else "right")
    for each in rows:
        mesh = " ".join(f"{name} {size}" for name, size in zip(MESH_AXES, each["mesh"], strict=True) if size != 1)
        capacity = f"{each['capacity'] / GIB:.0f}"
        work = f"{each['flops'] / 1e12:.1f}" if "flops" in each else ""
        if each["status"] == "compiled":
            sizes = [f"{each[name] / GIB:.2f}" for name in ("arguments", "temporaries", "peak")]
            traffic = [f"{t['count']} {kind} {t['bytes'] / GIB:.2f}" for kind, t in each["collectives"].items()]
            seconds = [f"{each['roofline'][name]:.3f}" for name in ("seconds", "half_peak")]
            grid.add_row(each["topology"], mesh, *sizes, capacity, work, *seconds, "\n".join(traffic) or "none")
        else:
            peak = f"{each['needed'] / GIB:.2f}" if each.get("needed") else ""
            why = each["status"] + (f": {each['detail']}" if each["status"] == "failed" else "")
            grid.add_row(each["topology"], mesh, "", "", peak, capacity, work, "", "", why)
    Console(width=None if sys.stdout.isatty() else 140).print(grid)


def write(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as JSON; the file appears whole. Raises UserError if it cannot be written."""
    aside = out.with_name(f"{out.name}.part")
    try:
        aside.write_text(json.dumps(list(rows), indent=2) + "\n")
        aside.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
