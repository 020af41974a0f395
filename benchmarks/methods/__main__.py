"""Compares methods of distillation, each at its best settings, by the protocol in docs/results.md.

    python -m benchmarks.methods                       # everything that is not finished; then tables and figures
    python -m benchmarks.methods --report              # tables and figures of what is finished
    python -m benchmarks.methods --nfe 2 --shift 0.6 --methods linear legendre-4

It can be stopped at any time, by Ctrl-C, SIGTERM or a power failure. The same command resumes: training from its last
checkpoint under --out, and, on another machine, from the results, which are small files for the repository.

    RESULTS/TEACHER/**/*.jsonl     what was measured        RESULTS/TEACHER/tables.md, *.png     tables and figures
    OUT/TEACHER/                   converted teacher, training runs, compilation cache

Needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.demo.run import TEACHERS
from arcflow_jax.errors import UserError, report_errors
from benchmarks.methods import report
from benchmarks.methods.protocol import METHODS, SCOPES
from benchmarks.methods.study import Study


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", choices=SCOPES, default="tiny-flux", help="a bundled teacher")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--nfe", nargs="+", type=int, help="the student's NFE; default: all")
    parser.add_argument("--shift", nargs="+", type=float, help="the timestep shift; default: all")
    parser.add_argument("--calls", type=int, help="teacher calls of a run; fewer than the protocol's are for trying")
    parser.add_argument("--prompts", type=int, help="test prompts; fewer than all are for trying")
    parser.add_argument("--report", action="store_true", help="only write tables and figures")
    given = parser.parse_args()
    with report_errors():
        scope, available = SCOPES[given.teacher], len(read_prompts(TEACHERS[given.teacher].world.test_prompts).texts)
        prompts = available if given.prompts is None else given.prompts
        if not 2 <= prompts <= available:
            raise UserError(f"prompts is {prompts}, but must be from 2 to {available}")
        wanted = [
            (nfe, shift)
            for nfe, shift in scope.methods
            if (given.nfe is None or nfe in given.nfe) and (given.shift is None or shift in given.shift)
        ]
        if not wanted:
            known = ", ".join(f"NFE {nfe} with shift {shift:g}" for nfe, shift in scope.methods)
            raise UserError(f"the protocol has no such NFE and shift: it has {known}")
        compared = list(dict.fromkeys(method for cell in wanted for method in scope.methods[cell]))
        if not set(compared) & set(given.methods):
            raise UserError(f"no method given is compared there; these are: {', '.join(compared)}")
        study = Study(given.teacher, given.out, given.results, given.calls or scope.calls, prompts)
        if not given.report:
            study.run(wanted, given.methods)
        report.write(study.files.folder, study.results)


if __name__ == "__main__":
    main()
