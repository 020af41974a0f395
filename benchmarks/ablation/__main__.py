"""Trains students of the bundled teacher with many settings, and compares them.

    python -m benchmarks.ablation                                  # everything that is not finished
    python -m benchmarks.ablation --report                         # table and figure of what is finished
    python -m benchmarks.ablation --cells legendre+k-3 --seeds 5   # some cells only

A cell is a variant of configs/tiny_ablation.py. Its students are trained as `arcflow train` does, and evaluated on the
same prompts and noise against the dense teacher: 50 Euler steps at the cell's guidance. After an interruption, by
Ctrl-C or SIGTERM, the same command resumes. Finished results are kept in OUT/results, one file each, and training
resumes from its last checkpoint.

    OUT/runs/CELL/SEED/   training runs        OUT/table.md        for BENCHMARKS.md
    OUT/results/*.json    figures              OUT/ablation.png

Cost: 51 runs and 105 evaluations of students took 2 h 15 min on two x86-64 cores, which were shared with other work for
part of it. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from arcflow_jax.errors import report_errors
from benchmarks.ablation.cells import CELLS
from benchmarks.ablation.report import write
from benchmarks.ablation.study import Study


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--steps", type=int, default=400, help="training steps of each run")
    parser.add_argument("--prompts", type=int, default=512, help="prompts to evaluate on, at most 512")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), metavar="CELL", help="default: all")
    parser.add_argument("--seeds", type=int, help="seeds per cell; default: 3 where methods are compared, else 1")
    parser.add_argument("--report", action="store_true", help="only write the report")
    arguments = parser.parse_args()
    with report_errors():
        study = Study(arguments.out, arguments.steps, arguments.prompts)
        if not arguments.report:
            study.run(arguments.cells, arguments.seeds)
        write(study)


if __name__ == "__main__":
    main()
