"""Which hardware does what: compiles all cases for GPUs and TPUs that are not there, and prints a Markdown table.

    python -m benchmarks.hardware --out runs/hardware.json

For cards of each size it takes the first way that needs at most nine tenths of the memory: the model as it is,
quantized to int8 or int4, with networks or blocks in host memory; and for training the published recipe with a batch of
four, or the recipe for a single card. What a case needs is by `arcflow compile-report`, for one H100 or TPU chip, at
1024 × 1024. The figures go to OUT; a case that is there is not compiled again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arcflow_jax.compile_report.report import Case, report
from arcflow_jax.parallel.chips import GIB
from arcflow_jax.storage.files import read_json, write_json

ROOT = Path(__file__).parents[1]
MODELS = {"FLUX.1-dev": ("flux", "flux.1-dev"), "Qwen-Image": ("qwen", "qwen-image")}
CARDS = (8, 12, 16, 24, 32, 48, 80)  # GiB
TPUS = {"v5e:1x1": 16, "v6e:1x1": 32, "v5p:1x1x1": 95}
USABLE = 0.9
NETWORKS = ("text-encoder", "sampler", "vae-decoder")
FORMATS = (None, "int8", "int4")
STUDENT = ("--config.adapter.rank=64",)
TRAINING = ("--config.remat=full",)


def sampling_cases(model: str, topology: str) -> Iterator[tuple[str, Case]]:
    """Each network, in each format, on the device or with its blocks in host memory."""
    recipe, folder = MODELS[model]
    overrides = (f"--config.model={ROOT / 'configs' / folder}", *STUDENT)
    for network in NETWORKS:
        for format in FORMATS:
            for offload in (None, "blocks"):
                if network == "vae-decoder" and (format or offload):
                    continue  # it stays as it is
                if offload and topology in TPUS:
                    continue
                name = f"{model}, {topology}, {network}, {format}, {offload}"
                yield name, Case(network, recipe, overrides, topology, (1, 1, 1, 1), 1, format, offload)


def training_cases(model: str, topology: str) -> Iterator[tuple[str, Case]]:
    """The published recipe, and that for a single card."""
    recipe, folder = MODELS[model]
    overrides = (f"--config.model={ROOT / 'configs' / folder}", *TRAINING)
    for variant, batch, formats in (("published", 4, FORMATS[:2]), ("single", 16, FORMATS[1:])):
        for format in formats:
            name = f"{model}, {topology}, {variant}, {format}"
            yield name, Case("train-steady", f"{recipe}:{variant}", overrides, topology, (1, 1, 1, 1), batch, format)


def all_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for model in MODELS:
        for topology in ("h100", *TPUS):
            cases |= dict(sampling_cases(model, topology))
        cases |= dict(training_cases(model, "h100"))
    return cases


def ways_to_sample(model: str, topology: str, needs: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Ways to sample and what each needs, in bytes, those that cost least first."""

    def need(network: str, format: str | None, offload: str | None = None) -> dict[str, float]:
        format, offload = (None, None) if network == "vae-decoder" else (format, offload)
        row = needs.get(f"{model}, {topology}, {network}, {format}, {offload}", {})
        unknown = {"peak": float("inf"), "arguments": 0.0}
        return row if row.get("status") == "compiled" else unknown

    for format in FORMATS:
        rows = [need(network, format) for network in NETWORKS]
        words = f"{format or 'bfloat16'} weights"
        held = sum(row["arguments"] for row in rows)
        yield words, held + max(row["peak"] - row["arguments"] for row in rows)
        yield f"{words}, `--offload networks`", max(row["peak"] for row in rows)
    for format in FORMATS:
        rows = [need(network, format, "blocks") for network in NETWORKS]
        yield f"{format or 'bfloat16'} weights, `--offload blocks`", max(row["peak"] for row in rows)


def ways_to_train(model: str, needs: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """The same for training."""
    recipe = MODELS[model][0]
    for variant, format in (("published", None), ("published", "int8"), ("single", "int8"), ("single", "int4")):
        row = needs.get(f"{model}, h100, {variant}, {format}", {})
        what = f"`{recipe}:{variant}`" + (", batch 4" if variant == "published" else "")
        yield f"{what}, {format or 'bfloat16'} base", row.get("peak", float("inf"))


def first_that_fits(ways: Iterator[tuple[str, float]], memory: float) -> str:
    found = next(((words, need) for words, need in ways if need <= USABLE * memory * GIB), None)
    return f"{found[0]}: {found[1] / GIB:.1f} GiB" if found else "does not fit"


def table(needs: dict[str, dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = ["| device | " + " | ".join(f"{model}: {what}" for model in MODELS for what in ("sample", "distil")) + " |"]
    lines.append("| --- " * (1 + 2 * len(MODELS)) + "|")
    for memory in CARDS:
        cells = []
        for model in MODELS:
            cells.append(first_that_fits(ways_to_sample(model, "h100", needs), memory))
            cells.append(first_that_fits(ways_to_train(model, needs), memory))
        lines.append(f"| a GPU of {memory} GB | {' | '.join(cells)} |")
    for topology, memory in TPUS.items():
        cells = [first_that_fits(ways_to_sample(model, topology, needs), memory) for model in MODELS]
        lines.append(
            f"| one TPU {topology.partition(':')[0]} ({memory} GiB) | {cells[0]} | see scale | {cells[1]} | see scale |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--limit", type=float, default=1800, help="seconds of one compilation")
    parser.add_argument("--gpus", action="store_true", help="compile for GPUs only")
    arguments = parser.parse_args()
    needs: dict[str, dict[str, Any]] = read_json(arguments.out) if arguments.out.exists() else {}
    for name, case in all_cases().items():
        if name not in needs and not (arguments.gpus and case.topology in TPUS):
            (row,) = report([case], arguments.limit, None)
            needs[name] = {key: row[key] for key in ("status", "arguments", "peak", "needed") if key in row}
            write_json(arguments.out, needs)
    print(table(needs))


if __name__ == "__main__":
    main()
