"""The whole job on a bundled teacher: convert, distil, sample, measure, report."""

from __future__ import annotations

import datetime
import json
import os
import platform
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from arcflow_jax.checkpoints.conversion import convert_model
from arcflow_jax.checkpoints.model_directory import DESCRIPTION, ModelDirectory
from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.demo import ASSETS, report
from arcflow_jax.demo.evaluate import Sampler, measure, run_samplers
from arcflow_jax.demo.world import caption_of
from arcflow_jax.errors import UserError
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training.loop import train
from arcflow_jax.training.recipe import Recipe, read_config

TEACHERS = {"tiny-flux": "tiny", "tiny-qwen": "tiny_qwen"}  # the bundled ones, and each one's recipe in configs/
TRAIN_PROMPTS = ASSETS / "prompts-train.txt"
TEST_PROMPTS = ASSETS / "prompts-test.txt"


def recipe(teacher: str, arg: str, out: Path) -> Recipe:
    """That of a bundled teacher for the student ARG, for a run under `out`."""
    config = read_config(f"{TEACHERS[teacher]}:{arg}")
    config.model, config.prompts, config.out = str(out / "teacher"), str(TRAIN_PROMPTS), str(out / arg)
    config.preview_every = 0  # the demo ends with pictures of its own
    return Recipe.from_config(config)


def convert(source: Path, out: Path) -> ModelDirectory:
    """The bundled teacher `source` as a model directory, `out`. One that is there already must be made of it."""
    if not (out / DESCRIPTION).exists():
        return ModelDirectory.open(convert_model(source, out))
    with tempfile.TemporaryDirectory() as aside:
        expected = ModelDirectory.open(convert_model(source, Path(aside) / "teacher"))
    present = ModelDirectory.open(out)
    if present.description["components"] != expected.description["components"]:
        raise UserError(f"{out} is not made of the bundled {source.name}: name another --out, or remove {out.parent}")
    return present


def demo(out: Path, teacher: str = "tiny-flux") -> dict[str, object]:
    """Runs the demo, or goes on with it where it stopped, and returns what it writes to metrics.json.

    Leaves under `out`: teacher/ (converted), arcflow/ and linear/ (students), metrics.json, grid.png, index.html.

    Args:
      teacher: one of `TEACHERS`.

    Raises:
      UserError: if `out` cannot be written, or holds the demo of another teacher.
    """
    console = Console()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None
    base = convert(ASSETS / teacher, out / "teacher")
    console.print(f"converted the bundled PyTorch teacher {teacher} to {out / 'teacher'}")
    recipes = {name: recipe(teacher, name, out) for name in ("arcflow", "linear")}
    for name, each in recipes.items():
        console.print(f"distilling the {name} student, {each.steps} iterations")
        train(each)

    dense = ArcFlowPipeline.from_pretrained(out / "teacher")
    arcflow, linear = (ArcFlowPipeline.from_pretrained(out / "teacher", adapter=out / name) for name in recipes)
    samplers = {
        "teacher_50": Sampler(dense, steps=50),
        "teacher_2": Sampler(dense, steps=2),
        "linear_2": Sampler(linear, steps=2),
        "arcflow_2": Sampler(arcflow, steps=2),
    }
    captions = [caption_of(prompt) for prompt in read_prompts(TEST_PROMPTS).texts]
    trained = recipes["arcflow"].distillation
    negative_prompt = trained.negative_prompt if trained.teacher_guidance == "cfg" else None
    results = run_samplers(samplers, captions, recipes["arcflow"].guidance, negative_prompt)
    figures = measure(results, captions, against="teacher_50")
    metrics = {
        **figures,
        "bars": bars(figures),
        "teacher": teacher,
        "prompts": len(captions),
        "iterations": recipes["arcflow"].steps,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} {platform.machine()} cores, Python {platform.python_version()}",
        "base": base.fingerprint,
    }
    report.write(out, metrics, results, captions, logs={name: out / name / "log.jsonl" for name in recipes})
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    console.print(table(figures))
    for bar in metrics["bars"]:
        verdict = "reached" if bar["reached"] else "MISSED"
        console.print(f"ArcFlow, {bar['what']}: {bar['value']:.3g}, bar {bar['bar']}: {verdict}")
    console.print(f"open {out / 'index.html'}, or look at {out / 'grid.png'}")
    return metrics


def bars(figures: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    """What the demo sets out to show: each with its measured value, its bar, and whether it was reached."""
    arcflow, teacher, linear, dense = (figures[name] for name in ("arcflow_2", "teacher_2", "linear_2", "teacher_50"))
    error = arcflow["endpoint_error"]
    lost = 100 * (dense["prompt_agreement"] - arcflow["prompt_agreement"])
    faster = dense["denoise_seconds_per_image"] / arcflow["denoise_seconds_per_image"]
    return [
        at_most("endpoint error over that of the teacher at 2 steps", error / teacher["endpoint_error"], 0.25),
        at_most("endpoint error over that of the linear student", error / linear["endpoint_error"], 0.7),
        at_most("points of prompt agreement below the teacher at 50 steps", lost, 5.0),
        {"what": "denoising, times faster than 50 steps", "value": faster, "bar": "≥ 18", "reached": faster >= 18},
    ]


def at_most(what: str, value: float, limit: float) -> dict[str, object]:
    return {"what": what, "value": value, "bar": f"≤ {limit:g}", "reached": value <= limit}


def table(figures: dict[str, dict[str, float]]) -> Table:
    """The figures, a row a sampler."""
    titles = ("endpoint error", "Fréchet distance", "prompt agreement", "denoising, ms", "whole path, ms", "speed-up")
    rows = Table("sampler", *titles)
    dense = figures["teacher_50"]["denoise_seconds_per_image"]
    for name, figure in figures.items():
        rows.add_row(
            name,
            f"{figure['endpoint_error']:.4f}",
            f"{figure['frechet_distance']:.2f}",
            f"{100 * figure['prompt_agreement']:.1f} %",
            f"{1000 * figure['denoise_seconds_per_image']:.2f}",
            f"{1000 * figure['seconds_per_image']:.2f}",
            f"{dense / figure['denoise_seconds_per_image']:.1f} ×",
        )
    return rows
