"""The whole path at real size on a small machine: FLUX.1-dev or FLUX.2 [klein] 4B in int8, or Qwen-Image in int4.

    python -m benchmarks.full_size --model flux.1-dev --folder /tmp/flux-size
    python -m benchmarks.full_size --model flux.2-klein-4b --folder /tmp/klein-size
    python -m benchmarks.full_size --model qwen-image --folder /tmp/qwen-size

Writes a diffusers folder of random weights with the exact sizes of all components, each tensor just before it is read,
and runs the commands of a user with one small card: convert --quantize, embed-prompts, train with the recipe `single`,
but rank 16 (two training steps of one small image; killed after the first, then resumed), sample (256 × 256, an NFE of
2), export. Then it reads the export back, and compares it with what PEFT expects. Each command is a process of its own.
Its time and peak memory go to FOLDER/report.json, and a step that is there is not run again. Prints a Markdown table.

Needs 24 GiB of memory, for Qwen-Image rather 32, and 15 GB (FLUX.2), 20 GB (FLUX.1-dev) or 25 GB (Qwen-Image) of
disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from PIL import Image
from safetensors import safe_open

from arcflow_jax.demo import ASSETS
from arcflow_jax.storage.files import read_json, write_json
from arcflow_jax.storage.paths import sizes_below
from benchmarks.convert_full_size import Values, convert_apart, make_source

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {
    "flux.1-dev": ("flux", "int8", "tiny-flux"),
    "flux.2-klein-4b": ("flux2", "int8", "tiny-qwen"),
    "qwen-image": ("qwen", "int4", "tiny-qwen"),
}
TOKENS = 64  # of a prompt
PROMPT = "a small red circle on the left"
ARCFLOW = (sys.executable, "-c", "from arcflow_jax.cli.app import main; main()")


class Report:
    """What has been measured in a folder so far, step by step."""

    def __init__(self, folder: Path):
        self.file = folder / "report.json"
        self.steps: dict[str, dict[str, Any]] = read_json(self.file) if self.file.exists() else {}

    def step(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Runs a step that has not been run, and keeps what it returns."""
        if name not in self.steps:
            print(f"{name} …", flush=True)
            self.steps[name] = run()
            write_json(self.file, self.steps)
        print(f"{name}: {self.steps[name]}", flush=True)

    def table(self) -> str:
        lines = ["| step | seconds | peak memory, GB | |", "| --- | --- | --- | --- |"]
        for name, found in self.steps.items():
            rest = {key: value for key, value in found.items() if key not in ("seconds", "peak_gb")}
            numbers = (f"{found['seconds']:.0f}", f"{found['peak_gb']:.1f}" if "peak_gb" in found else "")
            lines.append(f"| {name} | {' | '.join(numbers)} | {', '.join(f'{k} {v}' for k, v in rest.items())} |")
        return "\n".join(lines)


def arcflow(*arguments: object, kill_when: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Runs a command in a process of its own, and returns its seconds and peak memory.

    Args:
      kill_when: a condition under which the process is killed; it has to come.
    """
    start = time.perf_counter()
    process = subprocess.Popen([*ARCFLOW, *map(str, arguments)])
    while kill_when is not None:
        if process.poll() is not None:
            sys.exit(f"arcflow {arguments[0]} ended with status {process.returncode} before it was killed")
        if kill_when():
            process.kill()
            break
        time.sleep(0.2)
    _, status, usage = os.wait4(process.pid, 0)
    if kill_when is None and status:
        sys.exit(f"arcflow {arguments[0]} failed with status {os.waitstatus_to_exitcode(status)}")
    return {"seconds": time.perf_counter() - start, "peak_gb": usage.ru_maxrss * 1024 / 1e9}


def convert(options: argparse.Namespace) -> dict[str, Any]:
    """Makes the source with the bundled tokenizers, and converts it."""
    _, format, teacher = MODELS[options.model]
    source, model = options.folder / "source", options.folder / "model"
    shutil.rmtree(source, ignore_errors=True)  # of an attempt that was interrupted
    options.model, options.original, options.shard_gb = CONFIGS / options.model, False, 10
    arguments = make_source(source, options)
    for folder in sorted(source.glob("tokenizer*")):
        shutil.rmtree(folder)
        shutil.copytree(ASSETS / teacher / folder.name, folder)
        config = read_json(folder / "tokenizer_config.json")
        if folder.name != "tokenizer" or teacher == "tiny-qwen":  # CLIP has 77 tokens
            config["model_max_length"] = TOKENS + (34 if teacher == "tiny-qwen" else 0)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    size = sum(sizes_below(source).values())
    arguments = ["--source", str(source), "--out", str(model), "--quantize", format, *arguments]
    seconds, _, usage = convert_apart(arguments, Values(), as_it_goes=True)
    shutil.rmtree(source)
    written = sum(sizes_below(model).values())
    sizes = {"from_gb": round(size / 1e9, 1), "to_gb": round(written / 1e9, 1)}
    return {"seconds": seconds, "peak_gb": usage.ru_maxrss * 1024 / 1e9, **sizes}


def image_figures(folder: Path) -> dict[str, Any]:
    """The statistics of the one image in a folder. Ends the program if it is constant: NaN becomes 0."""
    (file,) = folder.glob("*.png")
    pixels = np.asarray(Image.open(file), np.float64)
    if pixels.std() < 1:
        sys.exit(f"{file} is constant")
    return {
        "image": f"{pixels.shape[1]} × {pixels.shape[0]}",
        "mean": round(float(pixels.mean()), 1),
        "std": round(float(pixels.std()), 1),
    }


def read_by_peft(export: Path) -> dict[str, Any]:
    """Compares the names and shapes of an export's LoRA with those that PEFT makes in the diffusers model."""
    import diffusers
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    start = time.perf_counter()
    config = read_json(export / "config.json")
    with safe_open(export / "diffusion_pytorch_model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    lora = {name: shape for name, shape in shapes.items() if ".lora_" in name}
    modules = sorted({name.partition(".lora_")[0] for name in lora})
    rank = next(shape[0] for name, shape in lora.items() if ".lora_A." in name)
    with torch.device("meta"):
        twin = getattr(diffusers, config["_class_name"].removeprefix("Arc")).from_config(config)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=modules), twin, "default")
    theirs = {
        name.replace(".default.", "."): list(tensor.shape)
        for name, tensor in twin.state_dict().items()
        if ".lora_" in name
    }
    if theirs != lora:
        sys.exit(f"PEFT expects {len(theirs)} tensors, the export has {len(lora)}, or their shapes differ")
    return {"seconds": time.perf_counter() - start, "tensors": len(lora), "rank": rank}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for all that is made; an interrupted run resumes")
    parser.add_argument("--set", action="append", default=[], help="COMPONENT.KEY=VALUE: change a config.json")
    parser.add_argument("--size", type=int, default=256, help="height and width of the sampled image")
    parser.add_argument("--training-size", type=int, default=64, help="height and width in training")
    options = parser.parse_args()
    folder, recipe = options.folder, MODELS[options.model][0]
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder)
    model, run = folder / "model", folder / "run"
    report.step("convert --quantize", lambda: convert(options))

    prompts, side = folder / "prompts.txt", options.training_size
    prompts.write_text(f"{PROMPT}\na large blue square\n")
    changes = {"model": model, "prompts": prompts, "steps": 2, "batch": 1, "accumulate": 1, "dtype": "float32"}
    changes |= {"resolutions": f"(({side}, {side}),)", "distillation.decay": 1, "save_every": 1, "log_every": 1}
    changes["adapter.rank"] = 16  # host memory has to hold what a card would hold
    training = ["--config", f"{recipe}:single", *(f"--config.{name}={value}" for name, value in changes.items())]
    training += ["--config.offload_optimizer=False"]  # this machine has one memory
    embeddings = folder / "embeddings"
    report.step("embed-prompts", lambda: arcflow("embed-prompts", *training, "--out", embeddings))
    training += [f"--config.embeddings={embeddings}", f"--config.out={run}"]
    saved = run / "checkpoints" / "1"
    report.step("train, killed", lambda: arcflow("train", *training, kill_when=saved.exists) | {"after": "1 step"})
    report.step("train, resumed", lambda: arcflow("train", *training) | {"until": "2 steps"})
    size = ("--height", options.size, "--width", options.size)
    sampling = ("--model", model, "--adapter", run, "--prompt", PROMPT, "--steps", 2, *size, "--out", folder / "images")
    report.step("sample", lambda: arcflow("sample", *sampling) | image_figures(folder / "images"))
    export = folder / "export"
    report.step("export", lambda: arcflow("export", "--adapter", run, "--out", export))
    report.step(
        "export, read back", lambda: arcflow("convert", "--adapter", export, "--base", model, "--out", folder / "back")
    )
    report.step("export, read by PEFT", lambda: read_by_peft(export))
    print(report.table())


if __name__ == "__main__":
    main()
