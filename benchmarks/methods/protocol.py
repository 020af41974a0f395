"""The protocol: what is compared, with which budget, and which settings a method may have. See docs/results.md.

Another method is one line in `METHODS`, another teacher one line in `SCOPES`. `results.Files` refuses results of other
weights, of another budget or number of prompts. Whoever changes anything else here, or a recipe, removes the results.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from arcflow_jax.demo.run import TEACHERS
from arcflow_jax.errors import UserError
from arcflow_jax.training.recipe import Recipe, read_config

# Each method, by what it changes in the teacher's recipe in configs/, once that has `AS_PUBLISHED`
AS_PUBLISHED = {"distillation.least_share": 0.0, "distillation.cuts": "sorted"}
SHARE = {"distillation.least_share": 0.4, "distillation.cuts": "stratified"}
LEGENDRE = {"adapter.basis": "legendre", "distillation.mode_dropout": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"adapter.modes": 1, "distillation.mode_dropout": 0.0},
    "momentum-4": {"adapter.modes": 4},
    "momentum-16": {"adapter.modes": 16},
    "momentum-16-share-0.4": {"adapter.modes": 16} | SHARE,
    "legendre-3": {"adapter.modes": 3} | LEGENDRE,
    "legendre-4": {"adapter.modes": 4} | LEGENDRE,
    "legendre-4-share-0.4": {"adapter.modes": 4} | LEGENDRE | SHARE,
}
# Those that are compared at every NFE and shift
MAIN = ("linear", "momentum-16", "momentum-16-share-0.4", "legendre-4")
# At the first NFE and shift, the search of these begins with the best setting of another method
BEGIN = {"momentum-4": "momentum-16", "legendre-3": "legendre-4"}
EULER = (2, 4, 8, 50)  # the teacher's steps; students are compared with the last

# What a method may choose from: each axis in order. The search begins with `GRID`, and may go on to its neighbours.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
BATCHES = (8, 16, 32, 64, 128)  # the more examples, the fewer training steps
# The teacher's share of the mixed trajectory falls from 1 to 0 over this part of the training steps
SCHEDULES = {"0": 0.0, "1/5": 0.2, "1": 1.0, "never": math.inf}
GRID = {"rate": (1e-4, 3e-4, 1e-3, 3e-3), "batch": (32,), "schedule": ("1/5", "never")}

STOPS = (1 / 8, 1 / 4, 1 / 2, 1.0)  # parts of the budget after which a run is evaluated
FIRST = 1 / 4  # of the budget, which all settings that a search begins with get
MOST = 12  # settings that get the whole budget, in a search that begins with the grid
SEARCH_SEED, SEEDS = 0, (1, 2, 3)
HELD_OUT = 0.2  # of the different training prompts: no student is trained on them, and the search validates on them
VALIDATION = 256  # of those, the prompts of the search
DIVERSE = 32  # test prompts whose images are compared with one another
TRACED = 64  # test prompts of the trajectory report

TEACHER, PROMPTS = "teacher", "prompts-train.txt"  # in the folder of a study


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a method may choose.

    Attributes:
      rate: the learning rate, constant after warm-up.
      batch: examples in a training step.
      schedule: a key of `SCHEDULES`.
    """

    rate: float
    batch: int
    schedule: str

    def __str__(self) -> str:
        return f"rate {self.rate:g}, batch {self.batch}, schedule {self.schedule}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method, the student's NFE and the timestep shift. Each cell has a search, and results of its own."""

    method: str
    nfe: int
    shift: float

    @property
    def place(self) -> tuple[int, float]:
        """The NFE and the timestep shift."""
        return self.nfe, self.shift

    def __str__(self) -> str:
        return f"{self.method}, NFE {self.nfe}, shift {self.shift:g}"


@dataclasses.dataclass(frozen=True)
class Scope:
    """What a bundled teacher's students are compared at.

    Attributes:
      calls: the budget of a run: how often the teacher is evaluated on one example.
      methods: which methods are compared at each NFE and timestep shift. They are in the order of the work.
      published: the cells where the published recipe is run too.
      start: the setting that the searches at the first NFE and shift begin with; None for `GRID`. The other searches
        begin with what was found there.
    """

    calls: int
    methods: dict[tuple[int, float], tuple[str, ...]]
    published: tuple[Cell, ...]
    start: Setting | None = None

    @property
    def first(self) -> tuple[int, float]:
        """The NFE and the timestep shift that the work begins with."""
        return next(iter(self.methods))


PUBLISHED = Setting(rate=1e-4, batch=16, schedule="1/5")
SCOPES = {
    "tiny-flux": Scope(
        51_200,
        {(2, 0.6): tuple(METHODS), (1, 0.6): MAIN, (2, 3.2): MAIN, (4, 0.6): MAIN, (2, 1.0): MAIN},
        published=tuple(Cell(method, 2, 3.2) for method in ("linear", "momentum-16", "legendre-4")),
    ),
    # The search begins near the setting of its recipe
    "tiny-emoji": Scope(
        38_400,
        {(2, 2.0): MAIN, (1, 2.0): MAIN},
        published=(Cell("momentum-16", 2, 2.0),),
        start=Setting(3e-3, 32, "1/5"),
    ),
}


def parent(cell: Cell, scope: Scope) -> Cell | None:
    """The cell whose best setting the search of this one begins with; None if it begins with the scope's."""
    if cell.place != scope.first:
        return Cell(cell.method, *scope.first)
    return Cell(BEGIN[cell.method], *scope.first) if cell.method in BEGIN else None


def has_grid(cell: Cell, scope: Scope) -> bool:
    """Whether the search of a cell begins with `GRID`."""
    return parent(cell, scope) is None and scope.start is None


def has_schedules(cell: Cell, scope: Scope) -> bool:
    """Whether a cell's best setting is also trained with every schedule of the teacher's share."""
    return has_grid(cell, scope) and not SHARE.items() <= METHODS[cell.method].items()


def training_steps(calls: int, recipe: Recipe) -> int:
    """How many training steps a budget of teacher calls has. Raises UserError if it has none."""
    steps = calls // calls_of_step(recipe)
    if not steps:
        raise UserError(f"{calls} teacher calls do not suffice for a training step, which has {calls_of_step(recipe)}")
    return steps


def calls_of_step(recipe: Recipe) -> int:
    """Teacher calls of one training step: M for each segment of each example."""
    return recipe.batch * recipe.distillation.nfe * recipe.distillation.states


def stop_after(part: float, steps: int) -> int:
    """The training step at which a part of the budget, one of `STOPS`, is used."""
    return steps if part == 1 else min(steps, round(part / STOPS[0]) * first_stop(steps))


def first_stop(steps: int) -> int:
    """The training step of the first stop. All but the last are multiples of it."""
    return max(1, round(STOPS[0] * steps))


def recipe(
    teacher: str, home: Path, out: Path, cell: Cell, setting: Setting, seed: int, calls: int, published: bool = False
) -> Recipe:
    """The recipe of a run that uses the whole budget.

    It is the teacher's own in configs/, with a constant learning rate after warm-up, as published. Warm-up, clipping
    and EMA begin after 5 % of the training steps there, and after 1 % in the published one.

    Args:
      teacher: a key of `TEACHERS`.
      home: has the converted teacher and the training prompts, see `TEACHER` and `PROMPTS`.
      out: the run's directory.
      calls: the budget.
      published: whether to take everything else as published too, LoRA's rank excepted.
    """
    config = read_config(TEACHERS[teacher].config)
    values = {"model": str(home / TEACHER), "prompts": str(home / PROMPTS), "out": str(out), "seed": seed}
    values |= {"batch": setting.batch, "preview_every": 0, "keep_last": 1, "max_skipped": 10**9}
    values |= {"distillation.nfe": cell.nfe, "distillation.shift": cell.shift}
    values |= {"optimizer.learning_rate": setting.rate, "optimizer.decay_steps": 0}
    values |= AS_PUBLISHED | METHODS[cell.method]
    config.update_from_flattened_dict(values)
    if published:
        config.adapter.dropout = 0.05
        if config.adapter.basis == "momentum" and config.adapter.modes > 1:
            config.optimizer.groups = (("head.proj_out_loggamma.*", 0.1),)
    steps = training_steps(calls, Recipe.from_config(config))
    part = SCHEDULES[setting.schedule]
    # A share that never falls: by 1e-9 in a training step
    config.distillation.decay = 10**9 if math.isinf(part) else round(part * steps)
    begin = round((0.01 if published else 0.05) * steps)
    config.optimizer.warmup = config.optimizer.clip_from = config.ema.start = begin
    config.steps, config.log_every = steps, max(1, steps // 80)
    config.save_every = config.keep_every = first_stop(steps)
    return Recipe.from_config(config)
