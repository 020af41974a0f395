"""Compiles the cases of a report one after the other, and prints their cost."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta
from rich.console import Console
from rich.table import Table

from arcflow_jax import schema
from arcflow_jax.compile_report.topology import chip, environment
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.networks.kernel import Format
from arcflow_jax.parallel.chips import GIB
from arcflow_jax.parallel.mesh import MESH_AXES
from arcflow_jax.schema import AxisSize, Batch
from arcflow_jax.storage.atomic import cannot_write
from arcflow_jax.storage.files import write_json

Seconds = Annotated[float, Meta(gt=0, le=1e6)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
      program: one of `programs.PROGRAMS`.
      config, overrides: the recipe.
      topology: e.g. "v5p:2x2x1", "v5p:2x2x1*2" for two such slices, or "h100:8".
      mesh: sizes of the axes data, fsdp, tensor, sequence; -1 stands for the remaining devices.
      batch: images on all devices together.
      quantize, offload: see `programs.WeightOptions`.
    """

    program: str
    config: str
    overrides: tuple[str, ...]
    topology: str
    mesh: tuple[AxisSize, ...]
    batch: Batch
    quantize: Format | None = None
    offload: Literal["blocks"] | None = None

    def __post_init__(self):
        schema.check(self)


def report(cases: Sequence[Case], limit: float, out: Path | None) -> list[dict[str, Any]]:
    """Compiles the cases, prints a table and, if `out` is given, writes the rows there as JSON.

    A program that needs too much memory or time, or that the compiler fails on, is a row too.

    Args:
      limit: seconds per case.

    Raises:
      UserError: before anything is compiled, if the compiler is not installed, or a topology, recipe, model or mesh
        does not fit.
    """
    environment([case.topology for case in cases])
    limit = schema.converted(Seconds, limit, "limit")
    ask(cases, limit, compiling=False)
    rows = []
    console = Console(stderr=True, markup=False)
    for case in cases:
        with console.status(f"compiling {case.program} for {case.topology}"):
            rows.append(row(case, ask([case], limit, compiling=True)))
        if out is not None:
            with cannot_write(out):
                write_json(out, rows)  # after each case, because the next may take long
    table(rows)
    return rows


def ask(cases: Sequence[Case], limit: float, *, compiling: bool) -> dict[str, Any]:
    """Lets a child process check all cases, or compile a single one, and returns its answer.

    Raises:
      UserError: if a case does not fit.
    """
    request = {"cases": [dataclasses.asdict(case) for case in cases], "compile": compiling}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "arcflow_jax.compile_report.child"],
            input=json.dumps(request),
            env=environment([case.topology for case in cases]),
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"status": f"not finished in {limit:.0f} s"}
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"status": "failed", "detail": one_line(last[0])}
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def row(case: Case, answer: dict[str, Any]) -> dict[str, Any]:
    """A case with its answer and the roofline: the least time at the chip's peak rates, and at half the matrix rate.

    The least time is the longer of two: the matrix operations, spread evenly over the devices, at the peak rate; and
    reading the arguments from memory as often as the program must.
    """
    device = chip(case.topology)
    found = dataclasses.asdict(case) | {"capacity": device.memory} | answer
    if answer["status"] == "compiled":
        compute = answer["flops"] / answer["devices"] / device.flops
        memory = answer["passes"] * answer["arguments"] / device.bandwidth
        found["roofline"] = {
            "seconds": max(compute, memory),
            "compute": compute,
            "memory": memory,
            "half_peak": 2 * compute,
        }
        if answer["peak"] > device.memory:  # the compiler for GPUs does not refuse it
            found |= {"status": "out of memory", "needed": answer["peak"]}
    return found


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows as a table."""
    grid = Table(title="sizes in GiB per device; collectives: count and result size of one run on one device")
    sizes = ("arguments", "temporaries", "peak", "capacity", "TFLOP")
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
    Console(width=None if sys.stdout.isatty() else 140, markup=False).print(grid)
