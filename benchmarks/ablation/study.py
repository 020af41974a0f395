"""Trains and evaluates cells, and keeps the finished results."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from arcflow_jax.console import duration
from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.demo import ASSETS
from arcflow_jax.demo.evaluate import Results, Sampler, diversity, measure, run_samplers
from arcflow_jax.demo.run import TEST_PROMPTS, TRAIN_PROMPTS
from arcflow_jax.demo.world import Caption, caption_of
from arcflow_jax.errors import UserError
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.models.model_directory import DESCRIPTION
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.storage.atomic import cannot_write, make_directory
from arcflow_jax.storage.files import read_json, write_json
from arcflow_jax.training.loop import train
from arcflow_jax.training.recipe import Recipe, read_config
from arcflow_jax.training.report.log import LOG
from benchmarks.ablation.cells import COMPARED, seeds

SOURCE = ASSETS / "tiny-flux"
CONFIG = Path(__file__).parents[2] / "configs" / "tiny_ablation.py"
EULER = (2, 4, 8, 50)  # the teacher's steps; students are compared with the last
DENSE = f"teacher_{EULER[-1]}"
DIVERSE = 32  # captions whose images are compared with one another
START = 150  # starting and evaluating a run takes about as long as this many training steps with NFE 1


@dataclasses.dataclass(frozen=True)
class Result:
    """The figures of a cell.

    Attributes:
      cell: a variant of configs/tiny_ablation.py, or a teacher (see `teacher`).
      seed, steps: seed and training steps; 0 for a teacher.
      seconds: median seconds per training step, without compilation; 0 for a teacher.
      figures: see `demo.evaluate.measure`; and `diversity`, see there, relative to the dense teacher's. Results of
        version 0.1 have none.
    """

    cell: str
    seed: int
    steps: int
    seconds: float
    figures: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Result:
        values = read_json(path)
        if "iterations" in values:  # as version 0.1 wrote it
            values["steps"] = values.pop("iterations")
        return cls(**values)


def teacher(steps: int, guidance: float) -> str:
    """The name of a teacher's result."""
    return f"teacher-{steps}-guidance-{guidance:g}"


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of cells under one budget.

    Attributes:
      out: the study's directory.
      steps: training steps of each run.
      prompts: number of test prompts to evaluate on.
    """

    out: Path
    steps: int
    prompts: int

    def __post_init__(self):
        available = len(read_prompts(TEST_PROMPTS).texts)
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}, but must be at least 1")
        if not 2 <= self.prompts <= available:
            raise UserError(f"prompts is {self.prompts}, but must be from 2 to {available}")
        known = self.out / "study.json"
        if known.exists() and read_json(known) != self.budget:
            before = ", ".join(f"{name} {value}" for name, value in read_json(known).items())
            raise UserError(f"{self.out} contains a study with {before}: choose another --out")

    @functools.cached_property
    def budget(self) -> dict[str, int | str]:
        """What all results share, including the weights of the bundled teacher."""
        digest = hashlib.sha256()
        for path in sorted(SOURCE.rglob("*.safetensors")):
            digest.update(path.read_bytes())
        return {"steps": self.steps, "prompts": self.prompts, "teacher": digest.hexdigest()[:12]}

    @functools.cached_property
    def captions(self) -> list[Caption]:
        return [caption_of(prompt) for prompt in read_prompts(TEST_PROMPTS).texts[: self.prompts]]

    def recipe(self, cell: str, seed: int = 0) -> Recipe:
        """The recipe of a cell's run. Raises UserError on a name that configs/tiny_ablation.py does not know."""
        config = read_config(f"{CONFIG}:{cell}")
        config.model, config.prompts = str(self.out / "teacher"), str(TRAIN_PROMPTS)
        config.out, config.seed = str(self.out / "runs" / cell / str(seed)), seed
        config.preview_every, config.save_every, config.keep_last = 0, 50, 1
        # The schedule scales with the number of steps
        config.distillation.decay = config.distillation.decay * self.steps // config.steps
        config.steps = config.optimizer.decay_steps = self.steps
        return Recipe.from_config(config)

    def stops(self, cell: str) -> list[int]:
        """The training steps after which a cell is evaluated: compared cells also during training."""
        parts = 4 if cell in COMPARED else 1
        return sorted({max(1, self.steps * i // parts) for i in range(1, parts + 1)})

    def file(self, cell: str, seed: int, steps: int) -> Path:
        return self.out / "results" / f"{cell}.{seed}.{steps}.json"

    def results(self) -> list[Result]:
        """All finished results."""
        return [Result.read(path) for path in sorted((self.out / "results").glob("*.json"))]

    def keep(self, result: Result) -> None:
        write_json(self.file(result.cell, result.seed, result.steps), dataclasses.asdict(result))

    def run(self, cells: Sequence[str], count: int | None = None) -> None:
        """Trains and evaluates what is not finished of these cells.

        Args:
          count: seeds per cell; by default as `cells.seeds` says.

        Raises:
          UserError: on an unknown cell, a run of another recipe, or a directory that cannot be written; as `train`.
          Preempted: as `train`.
        """
        self.begin({self.recipe(cell).guidance for cell in cells})
        runs = [(cell, seed) for cell in cells for seed in seeds(cell, count)]
        runs.sort(key=lambda run: (run[0] not in COMPARED, run[1]))
        work = {}
        for cell, seed in runs:
            recipe = self.recipe(cell, seed)
            recipe.check_same(Path(recipe.out))  # also if finished: the table must not mix recipes
            stops = self.stops(cell)
            for before, stop in zip([0, *stops], stops, strict=False):
                if not self.file(cell, seed, stop).exists():
                    work[cell, seed, stop] = recipe.distillation.nfe * (stop - before) + START
        print(f"{len(work)} evaluations to make", flush=True)
        began, done = time.monotonic(), 0
        for i, (cell, seed, stop) in enumerate(work):
            print(f"{cell}, seed {seed}, up to step {stop}", flush=True)
            result = self.measure(cell, seed, stop)
            self.keep(result)
            done += work[cell, seed, stop]
            rate = done / (time.monotonic() - began)
            error = result.figures["endpoint_error"]
            rest = duration((sum(work.values()) - done) / rate)
            print(f"{i + 1} of {len(work)}: endpoint error {error:.4f}; {rest} left in total", flush=True)

    def begin(self, guidances: Iterable[float]) -> None:
        """Makes what all cells need: the directory, the converted teacher and its figures. Raises UserError."""
        make_directory(self.out / "results")
        with cannot_write(self.out):
            write_json(self.out / "study.json", self.budget)
        if jax.config.jax_compilation_cache_dir is None:  # the seeds of a cell run the same program
            jax.config.update("jax_compilation_cache_dir", str(self.out / "cache"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        if not (self.out / "teacher" / DESCRIPTION).exists():
            convert_model(SOURCE, self.out / "teacher")
        for guidance in sorted(guidances):
            names = {steps: teacher(steps, guidance) for steps in EULER}
            if not all(self.file(name, 0, 0).exists() for name in names.values()):
                figures = measure(teachers(self, guidance), self.captions, against=DENSE)
                diverse = teachers_diversity(self, guidance)
                for steps, name in names.items():
                    found = f"teacher_{steps}"
                    relative = {"diversity": diverse[found] / diverse[DENSE]}
                    self.keep(Result(name, 0, 0, 0.0, figures[found] | relative))

    def measure(self, cell: str, seed: int, stop: int) -> Result:
        """Trains a cell up to a step, from its last checkpoint, and evaluates it."""
        recipe = self.recipe(cell, seed)
        run = train(dataclasses.replace(recipe, steps=stop))
        lines = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
        if lines[-1]["step"] != stop:
            raise UserError(f"{run} is past step {stop}, which was not evaluated: remove it to train it again")
        pipeline = ArcFlowPipeline.from_pretrained(self.out / "teacher", adapter=run)
        student = {"student": Sampler(pipeline, recipe.distillation.nfe)}
        dense = teachers(self, recipe.guidance)[DENSE]
        results = run_samplers(student, self.captions, recipe.guidance)
        figures = measure({DENSE: dense} | results, self.captions, against=DENSE)["student"]
        diverse = diversity(student, self.captions[:DIVERSE], recipe.guidance)["student"]
        figures["diversity"] = diverse / teachers_diversity(self, recipe.guidance)[DENSE]
        if stop == self.steps:
            jax.clear_caches()  # no other cell runs these programs
        seconds = statistics.median(1 / line["steps_per_second"] for line in lines)
        return Result(cell, seed, stop, seconds, figures)


@functools.cache
def teachers(study: Study, guidance: float) -> dict[str, Results]:
    """The teacher's results for each number of steps in `EULER`, under the name teacher_STEPS."""
    return run_samplers(teacher_samplers(study), study.captions, guidance)


@functools.cache
def teachers_diversity(study: Study, guidance: float) -> dict[str, float]:
    """The diversity of the teacher's images, under the same names."""
    return diversity(teacher_samplers(study), study.captions[:DIVERSE], guidance)


@functools.cache
def teacher_samplers(study: Study) -> dict[str, Sampler]:
    pipeline = ArcFlowPipeline.from_pretrained(study.out / "teacher")
    return {f"teacher_{n}": Sampler(pipeline, n) for n in EULER}
