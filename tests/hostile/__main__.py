"""`python -m tests.hostile --count 10000`: runs damaged inputs, prints how they ended; exit code 1 if one is bad."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"  # before the library reads it, here and in the processes
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from tests.hostile import runner


def main() -> None:
    from tests.hostile.families import FAMILIES

    parser = argparse.ArgumentParser("python -m tests.hostile", description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--family", action="append", choices=sorted(FAMILIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--show", type=int, default=3, help="cases shown for each cause")
    options = parser.parse_args()
    begin, results = time.time(), []
    with tempfile.TemporaryDirectory(prefix="hostile-cases-") as folder:
        os.environ["HOSTILE_FOLDER"] = folder
        for result in runner.run_all(
            runner.plan(options.family or list(FAMILIES), options.count, options.seed), options.jobs
        ):
            results.append(result)
            if len(results) % 100 == 0:
                print(f"{len(results)} cases, {sum(each.bad for each in results)} bad", file=sys.stderr, flush=True)
    if options.count == 1:
        print(results[0].what, results[0].ending.detail, sep="\n")
    print(runner.causes(results, options.show))
    print(runner.table(results))
    print(f"{len(results)} cases in {time.time() - begin:.0f} s with {options.jobs} processes")
    sys.exit(any(result.bad for result in results))


if __name__ == "__main__":
    main()
