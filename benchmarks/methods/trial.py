"""Trains a student up to a part of its budget, and measures it against the dense teacher from the same noises."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcflow_jax.checkpoints.training import DESCRIPTION
from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.demo.evaluate import SEED, Results, Sampler, diversity, measure, run_samplers
from arcflow_jax.demo.run import TEACHERS
from arcflow_jax.evaluate.trajectory.comparison import Comparison, ComparisonSettings
from arcflow_jax.evaluate.trajectory.report import Tally, compare_all, figures
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training.loop import train
from arcflow_jax.training.recipe import Recipe
from arcflow_jax.training.report.log import LOG
from benchmarks.methods.protocol import DIVERSE, EULER, HELD_OUT, TEACHER, TRACED, VALIDATION

DENSE = f"teacher_{EULER[-1]}"
VALIDATION_SEED = SEED + 1  # of the search's noises
TRACED_PARTS = ("total", "local", "drift")  # what is kept of the trajectory report


class Bench:
    """A teacher, the captions to measure students on, and what the teacher itself makes of them.

    Args:
      teacher: a key of `TEACHERS`.
      home: has the converted teacher.
      recipe: of any run; all have the same guidance.
      prompts: how many test prompts, and at most how many validation prompts, to measure on.
    """

    def __init__(self, teacher: str, home: Path, recipe: Recipe, prompts: int):
        self.model, self.world = home / TEACHER, TEACHERS[teacher].world
        trained = recipe.distillation
        self.guidance = recipe.guidance
        self.negative_prompt = trained.negative_prompt if trained.teacher_guidance == "cfg" else None
        _, validation = split_prompts(read_prompts(self.world.train_prompts).texts)
        test = read_prompts(self.world.test_prompts).texts
        self.validation, self.test = (
            [self.world.captions.of(text) for text in texts[:prompts]] for texts in (validation, test)
        )

    def teachers(self) -> dict[int, dict[str, Any]]:
        """The figures of the teacher's Euler steps on the test prompts, by their number."""
        found = measure(self.world, self._run(self._samplers, self.test, SEED), self.test, DENSE)
        diversities = self._diversity(self._samplers)
        return {
            n: found[f"teacher_{n}"] | {"diversity": diversities[f"teacher_{n}"] / diversities[DENSE]} for n in EULER
        }

    def validate(self, student: Path, nfe: int) -> dict[str, Any]:
        """The endpoint error of a student on the validation prompts, by which the search decides."""
        results = self._run({"student": self._student(student, nfe)}, self.validation, VALIDATION_SEED)["student"]
        latents, truth = (np.concatenate(each.latents) for each in (results, self._validation_truth))
        return {"endpoint_error": float(np.square(latents - truth).mean())}

    def test_figures(self, student: Path, nfe: int) -> dict[str, Any]:
        """The figures of a student on the test prompts."""
        sampler = {"student": self._student(student, nfe)}
        results = self._dense | self._run(sampler, self.test, SEED)
        found = measure(self.world, results, self.test, DENSE)["student"]
        return found | {"diversity": self._diversity(sampler)["student"] / self._dense_diversity}

    def segments(self, student: Path, nfe: int) -> list[dict[str, Any]]:
        """The trajectory report of a student: the parts of its error in each segment (see `evaluate.trajectory`)."""
        settings = ComparisonSettings(steps=nfe, seed=SEED)
        comparison = Comparison(self.model, student, settings, batch_size=16)
        tally = Tally()
        with contextlib.redirect_stdout(io.StringIO()):
            compare_all(comparison, [str(caption) for caption in self.test[:TRACED]], tally, None)
        return [
            {kind: {part: segment[kind][part] for part in TRACED_PARTS} for kind in ("velocity", "state")}
            | {"sigma": segment["sigma"]}
            for segment in figures(tally, comparison.grid)["segments"]
        ]

    def _student(self, student: Path, nfe: int) -> Sampler:
        return Sampler(ArcFlowPipeline.from_pretrained(self.model, adapter=student), nfe)

    def _run(self, samplers: dict[str, Sampler], captions: Sequence[Any], seed: int) -> dict[str, Results]:
        return run_samplers(samplers, captions, self.guidance, self.negative_prompt, seed=seed)

    def _diversity(self, samplers: dict[str, Sampler]) -> dict[str, float]:
        return diversity(self.world, samplers, self.test[:DIVERSE], self.guidance, self.negative_prompt)

    @functools.cached_property
    def _samplers(self) -> dict[str, Sampler]:
        pipeline = ArcFlowPipeline.from_pretrained(self.model)
        return {f"teacher_{n}": Sampler(pipeline, n) for n in EULER}

    @property
    def _dense_sampler(self) -> dict[str, Sampler]:
        return {DENSE: self._samplers[DENSE]}

    @functools.cached_property
    def _dense(self) -> dict[str, Results]:
        return self._run(self._dense_sampler, self.test, SEED)

    @functools.cached_property
    def _dense_diversity(self) -> float:
        return self._diversity(self._dense_sampler)[DENSE]

    @functools.cached_property
    def _validation_truth(self) -> Results:
        return self._run(self._dense_sampler, self.validation, VALIDATION_SEED)[DENSE]


def split_prompts(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training prompts, divided into those to train on and those of the search. No text is in both."""
    different = sorted(set(texts))
    order = np.random.default_rng(0).permutation(len(different))
    held = {different[i] for i in order[: round(HELD_OUT * len(different))]}
    return [text for text in texts if text not in held], [text for text in texts if text in held][:VALIDATION]


def train_to(recipe: Recipe, steps: int, console: Path) -> None:
    """Trains a run up to a training step, from its last checkpoint, if it has not come there before.

    Args:
      recipe: of the whole run.
      console: a file that gets what the training prints.
    """
    if not checkpoint(Path(recipe.out), steps).is_dir():
        with console.open("a") as file, contextlib.redirect_stdout(file):
            train(dataclasses.replace(recipe, steps=steps))


def checkpoint(run: Path, step: int) -> Path:
    """Where a run's checkpoint is."""
    return run / "checkpoints" / str(step)


def student_at(run: Path, step: int) -> Path:
    """The student after a training step, as a directory of its own: what reads a run takes its newest checkpoint."""
    alone = run / "stops" / str(step)
    if not alone.exists():
        shutil.copytree(checkpoint(run, step), checkpoint(alone, step))
        shutil.copy(run / DESCRIPTION, alone)
    return alone


def logged(run: Path, step: int, last: int) -> tuple[float, float]:
    """Mean loss and median seconds of the last training steps up to one. The median has no compilation."""
    with (run / LOG).open() as file:
        lines = [line for line in map(json.loads, file) if step - last < line["step"] <= step]
    losses = [math.nan if line["loss"] is None else line["loss"] for line in lines]
    return statistics.mean(losses), statistics.median(1 / line["steps_per_second"] for line in lines)
