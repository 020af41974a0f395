"""Does what the protocol asks for and is not done yet, and keeps each result as soon as there is one."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from arcflow_jax.console import duration
from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.demo import ASSETS
from arcflow_jax.demo.run import TEACHERS
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.models.model_directory import DESCRIPTION
from arcflow_jax.storage.atomic import make_directory, write_file
from arcflow_jax.storage.lock import one_writer
from benchmarks.methods import plan, search
from benchmarks.methods.protocol import (
    PROMPTS,
    PUBLISHED,
    SCHEDULES,
    SCOPES,
    SEARCH_SEED,
    SEEDS,
    TEACHER,
    Cell,
    Setting,
    calls_of_step,
    first_stop,
    has_schedules,
    parent,
    recipe,
    stop_after,
)
from benchmarks.methods.results import Files, Part, Result, errors
from benchmarks.methods.trial import Bench, logged, split_prompts, student_at, train_to


class Study:
    """A comparison of the students of one teacher.

    Args:
      teacher: a key of `SCOPES`.
      out: for the converted teacher and the training runs.
      results: where the results are, see `results`.
      calls: the budget of a run, in teacher calls.
      prompts: how many test prompts to measure on.

    Raises:
      UserError: if `results` has those of another protocol.
    """

    def __init__(self, teacher: str, out: Path, results: Path, calls: int, prompts: int):
        self.teacher, self.scope, self.calls, self.prompts = teacher, SCOPES[teacher], calls, prompts
        self.out = out / teacher
        digest = hashlib.sha256()
        for path in sorted((ASSETS / teacher).rglob("*.safetensors")):
            digest.update(path.read_bytes())
        identity = {"teacher": digest.hexdigest()[:12], "calls": calls, "prompts": prompts}
        self.files = Files(results / teacher, identity)
        self.results = self.files.all()
        self.trained = self.spent = 0.0  # whole runs that were trained now, and the seconds that they took

    def run(self, cells: Sequence[tuple[int, float]], methods: Sequence[str]) -> None:
        """Searches and measures what is not finished of these cells. Raises UserError and Preempted as `train`."""
        known = self.scope.methods
        self.planned = [Cell(method, *cell) for cell in cells for method in known[cell] if method in methods]
        with one_writer(self.out):
            make_directory(self.out)
            if jax.config.jax_compilation_cache_dir is None:  # the seeds of a cell run the same program
                jax.config.update("jax_compilation_cache_dir", str(self.out / "cache"))
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
            if not (self.out / TEACHER / DESCRIPTION).exists():
                convert_model(ASSETS / self.teacher, self.out / TEACHER)
            train, _ = split_prompts(read_prompts(TEACHERS[self.teacher].world.train_prompts).texts)
            write_file(self.out / PROMPTS, "\n".join(train).encode())
            if not any(result.part == "teacher" for result in self.results):
                for steps, figures in self.bench.teachers().items():
                    self.keep(Result("teacher", "teacher", steps, 0.0, figures=figures))
            for place in cells:
                here = [cell for cell in self.planned if cell.place == place]
                for cell in here:
                    self.search(cell)
                for seed in SEEDS:
                    for cell in here:
                        for part in plan.parts(cell, self.scope):
                            best, _ = search.best(errors(self.results, cell))
                            until = plan.end(self.results, part, cell, self.scope)
                            self.measure(part, cell, best if part == "best" else PUBLISHED, seed, until)
                for cell in here:
                    self.schedules(cell)

    @functools.cached_property
    def bench(self) -> Bench:
        some = recipe(self.teacher, self.out, self.out, Cell("linear", 1, 1.0), PUBLISHED, 0, self.calls)
        return Bench(self.teacher, self.out, some, self.prompts)

    def search(self, cell: Cell) -> None:
        """Searches a cell's best setting, and, before it, that of the cell whose setting it begins with."""
        if (before := parent(cell, self.scope)) is not None:
            self.search(before)
        while found := plan.missing(self.results, cell, self.scope):
            self.measure("search", cell, found[0][0], SEARCH_SEED, found[0][1])
        if self.folder("search", cell).exists():
            shutil.rmtree(self.folder("search", cell))
            jax.clear_caches()  # no other cell runs these programs

    def schedules(self, cell: Cell) -> None:
        """Trains the best setting with every schedule of the teacher's share, where the protocol has that."""
        if has_schedules(cell, self.scope):
            best, _ = search.best(errors(self.results, cell))
            for schedule in SCHEDULES:
                self.measure("schedules", cell, dataclasses.replace(best, schedule=schedule), SEEDS[0], 1.0)

    def measure(self, part: Part, cell: Cell, setting: Setting, seed: int, until: float) -> None:
        """Trains a run up to a part of its budget, and measures it at the stops up to there that have no result."""
        run = self.folder(part, cell) / f"{setting.rate:g}-{setting.batch}-{setting.schedule.replace('/', '-')}-{seed}"
        known = (cell, part, setting, seed)
        done = [r.share for r in self.results if (r.cell, r.part, r.setting, r.seed) == known]
        stops = [stop for stop in plan.stops(part, cell, self.scope, until) if stop not in done]
        if not stops:
            return
        print(f"{cell}, {part}, {setting}, seed {seed}, up to {until:g} of the budget", flush=True)
        published = part == "published"
        whole = recipe(self.teacher, self.out, run, cell, setting, seed, self.calls, published=published)
        began = time.monotonic()
        train_to(whole, stop_after(until, whole.steps), self.out / "train.log")
        for stop in stops:
            steps = stop_after(stop, whole.steps)
            student = student_at(run, steps)
            if part == "search":
                figures = self.bench.validate(student, cell.nfe)
            else:
                figures = self.bench.test_figures(student, cell.nfe)
                if part == "schedules" or (seed == SEEDS[0] and stop == self.chosen_stop(part, cell)):
                    figures["segments"] = self.bench.segments(student, cell.nfe)
            loss, seconds = logged(run, steps, first_stop(whole.steps))
            used = {"share": stop, "steps": steps, "calls": steps * calls_of_step(whole)}
            self.keep(
                Result(part, *vars(cell).values(), setting, seed, **used, seconds=seconds, loss=loss, figures=figures)
            )
        if part != "search":
            shutil.rmtree(run)
            jax.clear_caches()  # what comes next runs other programs
        self.trained += until - max(done, default=0.0)
        self.spent += time.monotonic() - began
        print(f"endpoint error {self.results[-1].error:.4f}; {self.left()} left", flush=True)

    def chosen_stop(self, part: Part, cell: Cell) -> float:
        """The part of the budget that the table shows: the search's for its best setting, all for the published one."""
        return search.best(errors(self.results, cell))[1] if part == "best" else 1.0

    def folder(self, part: Part, cell: Cell) -> Path:
        """Where a cell's runs are."""
        return self.out / "runs" / f"{cell.method}-nfe-{cell.nfe}-shift-{cell.shift:g}" / part

    def keep(self, result: Result) -> None:
        self.files.keep(result)
        self.results.append(result)

    def left(self) -> str:
        """About how long the rest will take at the speed so far."""
        return duration(plan.runs_left(self.results, self.planned, self.scope) * self.spent / self.trained)
