"""Trains students of the bundled teacher in many ways, and compares what came of them.

    python -m benchmarks.ablation                                  # all of it, or what is missing
    python -m benchmarks.ablation --report                         # table and figure of what is finished
    python -m benchmarks.ablation --cells legendre+k-3 --seeds 5   # a part of it

A cell is a variant of configs/tiny_ablation.py. It is trained by `arcflow_jax.train`, its students are evaluated on the
same prompts and noises, and the dense teacher, 50 Euler steps at the cell's guidance, is the measure. Interrupted, by
Ctrl-C or SIGTERM, the same command goes on: what is finished stands in OUT/results, a file each, and training goes on
from its last checkpoint.

    OUT/runs/CELL/SEED/   training runs        OUT/table.md        for BENCHMARKS.md
    OUT/results/*.json    figures              OUT/ablation.png

Cost: 51 runs and 105 evaluations of students took two hours and a quarter on two x86-64 cores, a compiler beside them
for a part of it. Needs matplotlib.
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
    parser.add_argument("--steps", type=int, default=400, help="iterations of each run")
    parser.add_argument("--prompts", type=int, default=512, help="that are evaluated on, at most 512")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), metavar="CELL", help="by default all")
    parser.add_argument("--seeds", type=int, help="of each cell; by default 3 where methods are compared, else 1")
    parser.add_argument("--report", action="store_true", help="trains nothing")
    arguments = parser.parse_args()
    with report_errors():
        study = Study(arguments.out, arguments.steps, arguments.prompts)
        if not arguments.report:
            study.run(arguments.cells, arguments.seeds)
        write(study)


if __name__ == "__main__":
    main()
