"""What an accelerator does with FLUX.1-dev's size, random weights: attention, forward pass, sampler, training step.

    python -m benchmarks.accelerator --out runs/accelerator          # meant to take at most 25 minutes on an H100
    python -m benchmarks.accelerator --out /tmp/tiny --tiny          # the same rows, small, also on a CPU

Each row runs in a process of its own, so its peak memory is its own, and one that runs out of memory ends no other. The
figures go to OUT/results.json and, as a Markdown table, to OUT/table.md. A row that is there is not run again: an
interrupted run resumes. Rows that do not fit, or whose packages are missing, say so. PyTorch and diffusers are needed
for the rows named diffusers only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import jax

from arcflow_jax.errors import one_line, out_of_memory
from arcflow_jax.storage.files import read_json, write_json
from benchmarks.accelerator_rows import ROOT, Row, Skipped, command, rows

LIMIT = 600  # seconds of a row
SHOWN = ("seconds", "tflops_per_device", "peak_gib", "mfu", "finite")


def run_row(name: str, tiny: bool) -> Row:
    try:
        return rows(tiny)[name]() | {"device": jax.devices()[0].device_kind}
    except Skipped as error:
        return {"skipped": str(error)}
    except Exception as error:
        if not out_of_memory(error):
            raise
        return {"skipped": f"out of memory: {one_line(error)}"}


def row_apart(name: str, tiny: bool) -> Row:
    """A row, run in a process of its own."""
    try:
        done = subprocess.run(command(name, tiny), capture_output=True, text=True, timeout=LIMIT, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"skipped": f"not finished in {LIMIT} s"}
    if done.returncode:
        return {"skipped": f"failed: {one_line((done.stderr.strip().splitlines() or ['?'])[-1])}"}
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    """The figures in Markdown."""
    product = results["rows"].get("matrix product", {}).get("tflops_per_device")
    titles = ("row", "seconds", "TFLOP/s", "of the plain product", "peak GiB", "")
    lines = [f"{results['device']}, jax {results['jax']}, {results['date']}", "", f"| {' | '.join(titles)} |"]
    lines.append("| --- " * len(titles) + "|")
    for name, row in results["rows"].items():
        rate = row.get("tflops_per_device")
        cells = [f"{row['seconds']:.4f}" if "seconds" in row else "", f"{rate:.1f}" if rate else ""]
        cells += [f"{100 * rate / product:.0f} %" if rate and product else ""]
        cells += [f"{row['peak_gib']:.2f}" if "peak_gib" in row else ""]
        others = {key: value for key, value in row.items() if key not in SHOWN}
        words = [
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in others.items()
        ]
        cells += ["; ".join(words + ([] if row.get("finite", True) else ["NOT FINITE"]))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def all_rows(out: Path, tiny: bool) -> dict[str, Any]:
    """Runs the rows that are not in OUT yet. This process leaves the device to them."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    about = {"device": "", "jax": importlib.metadata.version("jax"), "date": time.strftime("%Y-%m-%d"), "rows": {}}
    results = read_json(file) if file.exists() else about
    for name in rows(tiny):
        if name not in results["rows"]:
            start = time.perf_counter()
            row = row_apart(name, tiny)
            results["device"] = row.pop("device", results["device"])
            results["rows"][name] = row
            print(f"{name}: {row} ({time.perf_counter() - start:.0f} s)", flush=True)
            write_json(file, results)
            (out / "table.md").write_text(table(results))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the figures")
    parser.add_argument("--tiny", action="store_true", help="the bundled teacher instead of FLUX.1-dev's size")
    parser.add_argument("--row", help="run this row only, and print its figures as JSON")
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(run_row(arguments.row, arguments.tiny)))
    elif arguments.out is None:
        parser.error("name a folder with --out")
    else:
        print(table(all_rows(arguments.out, arguments.tiny)))


if __name__ == "__main__":
    main()
