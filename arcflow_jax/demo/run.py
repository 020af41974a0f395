"""The whole job on a bundled teacher: convert, distil, sample, measure, report."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Column, Table

from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.demo import ASSETS, emoji, report, shapes
from arcflow_jax.demo.evaluate import Sampler, measure, run_samplers
from arcflow_jax.demo.trajectory import film
from arcflow_jax.demo.world import World
from arcflow_jax.errors import UserError
from arcflow_jax.generate import TEACHER_STEPS
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.models.model_directory import DESCRIPTION, ComponentDescription, ModelDirectory
from arcflow_jax.networks.kernel import Format
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.storage.atomic import cannot_write, make_directory
from arcflow_jax.storage.files import write_json
from arcflow_jax.storage.lock import one_writer
from arcflow_jax.training.loop import train
from arcflow_jax.training.recipe import Recipe, read_config


class Teacher(NamedTuple):
    """A bundled teacher.

    Attributes:
      world: the images that it knows.
      config: the name of its recipe in configs/.
    """

    world: World
    config: str


TEACHERS = {
    "tiny-emoji": Teacher(emoji.WORLD, "tiny_emoji"),
    "tiny-flux": Teacher(shapes.WORLD, "tiny"),
    "tiny-flux2": Teacher(shapes.WORLD, "tiny_flux2"),
    "tiny-qwen": Teacher(shapes.WORLD, "tiny_qwen"),
}


def recipe(teacher: str, out: Path) -> Recipe:
    """The recipe of a bundled teacher's student, for a run under `out`."""
    world, name = TEACHERS[teacher]
    config = read_config(name)
    config.model, config.prompts, config.out = str(out / "teacher"), str(world.train_prompts), str(out / "arcflow")
    config.preview_every = 0  # the demo makes its own images at the end
    return Recipe.from_config(config)


def convert(source: Path, out: Path, quantize: Format | None) -> ModelDirectory:
    """Converts the bundled teacher `source` to the model directory `out`, or checks the one that is there."""
    if not (out / DESCRIPTION).exists():
        return ModelDirectory.open(convert_model(source, out, quantize=quantize))
    with tempfile.TemporaryDirectory() as aside:
        expected = ModelDirectory.open(convert_model(source, Path(aside) / "teacher", quantize=quantize))
    present = ModelDirectory.open(out)
    if sources(present) != sources(expected):
        raise UserError(
            f"{out} was not converted from the bundled {source.name}{f' in {quantize}' if quantize else ''}: "
            f"choose another --out, or remove {out.parent}"
        )
    return present


def sources(model: ModelDirectory) -> dict[str, ComponentDescription]:
    """What each component was converted from, and to which dtype, whatever the format's version."""
    return {name: dataclasses.replace(each, stored=None) for name, each in model.description.components.items()}


def demo(out: Path, teacher: str = "tiny-emoji", quantize: Format | None = None) -> dict[str, object]:
    """Runs the demo, or resumes it, and returns what it writes to metrics.json.

    Writes to `out`: teacher/ (converted), arcflow/ (the student), metrics.json, grid.png, index.html.

    Args:
      teacher: one of `TEACHERS`.
      quantize: format of the kernels of its transformer and text encoders.

    Raises:
      UserError: if `out` cannot be written, or contains the demo of another teacher.
    """
    with one_writer(out):
        make_directory(out)
        return run_demo(out, teacher, quantize)


def run_demo(out: Path, teacher: str, quantize: Format | None) -> dict[str, object]:
    """`demo`, by the one writer of `out`."""
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False, soft_wrap=True)
    world = TEACHERS[teacher].world
    base = convert(ASSETS / teacher, out / "teacher", quantize)
    console.print(f"converted the bundled PyTorch teacher {teacher} to {out / 'teacher'}")
    trained = recipe(teacher, out)
    console.print(f"distilling the student, {trained.steps} training steps")
    run = train(trained)

    dense = ArcFlowPipeline.from_pretrained(out / "teacher")
    student = ArcFlowPipeline.from_pretrained(out / "teacher", adapter=run)
    samplers = {
        "teacher_50": Sampler(dense, steps=TEACHER_STEPS),
        "teacher_4": Sampler(dense, steps=4),
        "teacher_2": Sampler(dense, steps=2),
        "arcflow_2": Sampler(student, steps=2),
    }
    captions = [world.captions.of(prompt) for prompt in read_prompts(world.test_prompts).texts]
    settings = trained.distillation
    negative_prompt = settings.negative_prompt if settings.teacher_guidance == "cfg" else None
    results = run_samplers(samplers, captions, trained.guidance, negative_prompt)
    trajectories = film(dense, student, list(map(str, captions)), trained.guidance, negative_prompt, TEACHER_STEPS)
    figures = measure(world, results, captions, against="teacher_50")
    metrics = {
        **figures,
        "bars": bars(figures),
        "teacher": teacher,
        "prompts": len(captions),
        "training_steps": trained.steps,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} {platform.machine()} cores, Python {platform.python_version()}",
        "base": base.fingerprint,
    }
    with cannot_write(out):
        report.write(out, metrics, results, captions, trajectories, run / "log.jsonl")
        write_json(out / "metrics.json", metrics)
    console.print(table(figures))
    for bar in metrics["bars"]:
        verdict = "reached" if bar["reached"] else "MISSED"
        console.print(f"ArcFlow: {bar['what']}: {bar['value']:.3g}, target {bar['bar']}: {verdict}")
    console.print(f"open {out / 'index.html'} or {out / 'grid.png'}")
    return metrics


def bars(figures: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    """The demo's targets, each with its measured value, its bar, and whether it was reached."""
    arcflow, two, four, dense = (figures[name] for name in ("arcflow_2", "teacher_2", "teacher_4", "teacher_50"))
    error = arcflow["endpoint_error"]
    lost = 100 * (dense["prompt_agreement"] - arcflow["prompt_agreement"])
    faster = dense["denoise_seconds_per_image"] / arcflow["denoise_seconds_per_image"]
    return [
        at_most("endpoint error relative to the teacher in 2 steps", error / two["endpoint_error"], 0.3),
        at_most("endpoint error relative to the teacher in 4 steps", error / four["endpoint_error"], 1.0),
        at_most("loss of prompt agreement against the teacher in 50 steps, in percentage points", lost, 5.0),
        {"what": "speed-up of denoising over 50 steps", "value": faster, "bar": "≥ 18", "reached": faster >= 18},
    ]


def at_most(what: str, value: float, limit: float) -> dict[str, object]:
    return {"what": what, "value": value, "bar": f"≤ {limit:g}", "reached": value <= limit}


def table(figures: dict[str, dict[str, float]]) -> Table:
    """The figures, a row per sampler."""
    titles = (
        "endpoint error",
        "Fréchet distance",
        Column("prompt agreement", min_width=9),
        "denoise, ms",
        "prompt to image, ms",
        "speed-up",
    )
    rows = Table(Column("sampler", no_wrap=True, min_width=10), *titles)
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
