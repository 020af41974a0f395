"""Checks cases, or compiles one, in a child process: JSON request on stdin, JSON answer on stdout.

It needs its own process because a compilation takes gigabytes that only the end of the process frees, may never finish,
and may crash.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import Counter
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from arcflow_jax.compile_report.collectives import collectives
from arcflow_jax.compile_report.programs import PROGRAMS, Program, WeightOptions
from arcflow_jax.compile_report.topology import describe
from arcflow_jax.errors import UserError, one_line, out_of_memory
from arcflow_jax.networks.kernel import Format
from arcflow_jax.parallel.mesh import make_mesh
from arcflow_jax.training.recipe import Recipe, read_config
from arcflow_jax.training.work import flops


def build(
    program: str,
    config: str,
    overrides: list[str],
    topology: str,
    mesh: list[int],
    batch: int,
    quantize: Format | None,
    offload: Literal["blocks"] | None,
) -> tuple[Mesh, Program]:
    """The mesh and program of a case. Raises UserError if recipe, model, topology, mesh or batch do not fit."""
    grid = make_mesh(mesh, describe(topology))
    return grid, PROGRAMS[program](
        Recipe.from_config(read_config(config, overrides)), grid, batch, WeightOptions(quantize, offload)
    )


def compile_program(mesh: Mesh, program: Program) -> dict[str, Any]:
    """Compiles a program for a mesh: bytes per device, operations on all devices together, and communication.

    Of what runs after it, time, operations, communication and peak are counted too.
    """
    answer = compile_alone(mesh, program)
    if program.then is None or answer["status"] != "compiled":
        return answer
    then = compile_program(mesh, program.then)
    if then["status"] != "compiled":
        return then
    first, second = ({kind: Counter(t) for kind, t in each["collectives"].items()} for each in (answer, then))
    answer["collectives"] = {kind: first.get(kind, Counter()) + second.get(kind, Counter()) for kind in first | second}
    return answer | {
        **{name: answer[name] + then[name] for name in ("seconds", "flops")},
        "peak": max(answer["peak"], then["peak"]),
    }


def compile_alone(mesh: Mesh, program: Program) -> dict[str, Any]:
    """Compiles a program, without what runs after it."""
    start = time.monotonic()
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.arguments, **program.keywords)
        answer = {"devices": mesh.size, "mesh": list(mesh.devices.shape), "passes": program.passes}
        answer["remat"] = program.keywords.get("remat")
        answer["flops"] = flops(traced.jaxpr.jaxpr)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            return answer | {"status": "out of memory", "needed": needed(str(error)), "detail": one_line(error)}
    memory = compiled.memory_analysis()
    traffic = collectives(compiled.as_text())
    return answer | {
        "status": "compiled",
        "seconds": time.monotonic() - start,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(program.beside)),
        "collectives": {kind: {"count": t.count, "bytes": t.bytes} for kind, t in traffic.items()},
    }


def needed(message: str) -> float | None:
    """The bytes that a program needs, from the message "(26.04G) exceeds available …"; None if it states none."""
    match = re.search(r"\(?(\d+(?:\.\d+)?)([KMGT])\)? exceeds available", message)
    return float(match.group(1)) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[match.group(2)] if match else None


def main() -> None:
    request = json.load(sys.stdin)
    try:
        programs = [build(**case) for case in request["cases"]]
        answer: Any = compile_program(*programs[0]) if request["compile"] else {}
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
