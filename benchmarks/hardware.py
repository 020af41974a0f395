"""Which hardware does what: compiles for GPUs and TPUs that are not there, and prints a Markdown table.

    python -m benchmarks.hardware --out runs/hardware.json

For devices of each size it takes the first way that needs at most nine tenths of the memory: the model as it is,
quantized to int8 or int4, with networks or blocks in host memory; and for training the published recipe with a batch of
four, or the recipe for a single card. What a case needs is by `arcflow compile-report`, for one H100 or TPU chip, at
1024 × 1024. The figures go to OUT. Only cases that a table asks for and that are not there are compiled. Without --gpu
and --tpu, the table has all cards and all chips.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from arcflow_jax.compile_report.report import Case, report
from arcflow_jax.parallel.chips import GIB
from arcflow_jax.storage.files import read_json, write_json

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of the table.

    Attributes:
      recipe: its recipe.
      variant: of the recipe, that is trained with a batch of four.
      folder: of its config files, in configs/.
    """

    recipe: str
    variant: str
    folder: str


MODELS = {
    "FLUX.1-dev": Model("flux", "published", "flux.1-dev"),
    "Qwen-Image": Model("qwen", "published", "qwen-image"),
    "FLUX.2 [klein] 4B": Model("flux2", "4b", "flux.2-klein-4b"),
    "FLUX.2 [klein] 9B": Model("flux2", "9b", "flux.2-klein-9b"),
}
CARDS = (8, 12, 16, 24, 32, 48, 80)  # GiB
GPU = "h100"
TPUS = {"v5e": ("v5e:1x1", 16), "v6e": ("v6e:1x1", 32), "v5p": ("v5p:1x1x1", 95)}  # topology, GiB
USABLE = 0.9
NETWORKS = ("text-encoder", "sampler", "vae-decoder")
FORMATS = (None, "int8", "int4")
WORDS = {None: "bfloat16", "int8": "int8", "int4": "int4"}


class Needs:
    """What the cases need, in a file; compiles a case when it is asked for first."""

    def __init__(self, out: Path, limit: float):
        self.out, self.limit = out, limit
        self.rows: dict[str, dict[str, Any]] = read_json(out) if out.exists() else {}

    def of(self, name: str, case: Case) -> dict[str, float]:
        """Arguments and peak of a case, in bytes; the least known, or infinite, if it was not compiled."""
        if name not in self.rows:
            (row,) = report([case], self.limit, None)
            if row["status"] == "failed":  # which says nothing of its needs
                raise SystemExit(f"{name}: {row['detail']}")
            self.rows[name] = {key: row[key] for key in ("status", "arguments", "peak", "needed") if key in row}
            write_json(self.out, self.rows)
        row = self.rows[name]
        return row if row["status"] == "compiled" else {"peak": row.get("needed", math.inf), "arguments": 0.0}

    def sampling(self, name: str, topology: str, network: str, format: Any, offload: Any = None) -> dict[str, float]:
        """Of a network, in a format, on the device or with its blocks in host memory."""
        if network == "vae-decoder":
            format = offload = None  # it stays as it is
        model, one = MODELS[name], (1, 1, 1, 1)
        overrides = (f"--config.model={ROOT / 'configs' / model.folder}", "--config.adapter.rank=64")
        case = Case(network, model.recipe, overrides, topology, one, 1, format, offload)
        return self.of(f"{name}, {topology}, {network}, {format}, {offload}", case)

    def training(self, name: str, variant: str, batch: int, format: Any) -> float:
        """Peak of a training step on a GPU, in bytes."""
        model = MODELS[name]
        overrides = (f"--config.model={ROOT / 'configs' / model.folder}", "--config.remat=full")
        case = Case("train-steady", f"{model.recipe}:{variant}", overrides, GPU, (1, 1, 1, 1), batch, format)
        return self.of(f"{name}, {GPU}, {variant}, {format}", case)["peak"]


def ways_to_sample(name: str, topology: str, needs: Needs) -> Iterator[tuple[str, float]]:
    """Ways to sample and what each needs, in bytes, those that cost least first."""
    for format in FORMATS:
        rows = [needs.sampling(name, topology, network, format) for network in NETWORKS]
        held = sum(row["arguments"] for row in rows)
        if all(row["arguments"] for row in rows):
            yield WORDS[format], held + max(row["peak"] - row["arguments"] for row in rows)
        yield f"{WORDS[format]}, `--offload networks`", max(row["peak"] for row in rows)
    for format in FORMATS if topology == GPU else ():
        rows = [needs.sampling(name, topology, network, format, "blocks") for network in NETWORKS]
        yield f"{WORDS[format]}, `--offload blocks`", max(row["peak"] for row in rows)


def ways_to_train(name: str, needs: Needs) -> Iterator[tuple[str, float]]:
    """The same for training on a GPU."""
    recipe, published = MODELS[name].recipe, MODELS[name].variant
    for variant, batch, format in (
        (published, 4, None),
        (published, 4, "int8"),
        ("single", 16, "int8"),
        ("single", 16, "int4"),
    ):
        what = f"`{recipe}:{variant}`" + (", batch 4" if batch == 4 else "")
        yield f"{what}, {WORDS[format]} base", needs.training(name, variant, batch, format)


def first_that_fits(ways: Iterator[tuple[str, float]], memory: float) -> str:
    known = True
    for words, need in ways:
        if need <= USABLE * memory * GIB:
            return f"{words}: {need / GIB:.1f} GiB"
        known &= need < math.inf
    return "does not fit" if known else "not known"


def table(needs: Needs, models: Sequence[str], gpu: bool, tpus: Mapping[str, tuple[str, int]]) -> Iterator[str]:
    """The lines of the table, in Markdown."""
    kinds = ("sample", "distil") if gpu else ("sample",)
    yield "| device | " + " | ".join(f"{name}: {kind}" for name in models for kind in kinds) + " |"
    yield "| --- " * (1 + len(kinds) * len(models)) + "|"
    for memory in CARDS if gpu else ():
        cells = []
        for name in models:
            cells.append(first_that_fits(ways_to_sample(name, GPU, needs), memory))
            cells.append(first_that_fits(ways_to_train(name, needs), memory))
        yield f"| a GPU of {memory} GB | {' | '.join(cells)} |"
    for chip, (topology, memory) in tpus.items():
        cells = []
        for name in models:
            cells.append(first_that_fits(ways_to_sample(name, topology, needs), memory))
            cells += ["see scale"] if gpu else []
        yield f"| one TPU {chip} ({memory} GiB) | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--limit", type=float, default=1800, help="seconds of one compilation")
    parser.add_argument("--gpu", action="store_true", help="the cards")
    parser.add_argument("--tpu", action="append", choices=TPUS, help="a TPU chip; may be given several times")
    parser.add_argument("--model", action="append", choices=MODELS, help="a model; by default all")
    arguments = parser.parse_args()
    everything = not arguments.gpu and not arguments.tpu
    chips = {name: TPUS[name] for name in (TPUS if everything else arguments.tpu or ())}
    needs = Needs(arguments.out, arguments.limit)
    for line in table(needs, arguments.model or list(MODELS), arguments.gpu or everything, chips):
        print(line, flush=True)


if __name__ == "__main__":
    main()
