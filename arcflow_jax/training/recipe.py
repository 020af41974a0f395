"""Recipes: `NAME[:VARIANT]` or `FILE.py[:VARIANT]` plus overrides, to a checked `Recipe`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict
from msgspec import Meta

from arcflow_jax import configs, schema
from arcflow_jax.errors import UserError, first_few, of_files, one_line
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.networks.states import nest
from arcflow_jax.networks.student import AdapterConfig
from arcflow_jax.parallel.mesh import check_sizes
from arcflow_jax.parallel.processes import is_main
from arcflow_jax.schema import (
    AxisSize,
    Batch,
    Count,
    Guidance,
    Period,
    Pixels,
    Precision,
    Seed,
    TrainingSteps,
    no_default,
)
from arcflow_jax.storage.files import read_json, write_json
from arcflow_jax.storage.paths import as_path
from arcflow_jax.training.optimizer import OptimizerConfig
from arcflow_jax.training.overrides import checked, flatten, kind_of, parsed
from arcflow_jax.training.remat import Choice
from arcflow_jax.training.state import EmaConfig

Sizes = Annotated[
    tuple[tuple[Pixels, Pixels], ...],
    Meta(min_length=1, description="a list of sizes, each (height, width) in pixels, e.g. ((1024, 1024),)"),
]
SETTINGS = "config.json"  # in the run's directory: the recipe with all overrides
# What may differ when a run is resumed: where things are, for how long and how often. The rest decides its numbers.
CHANGEABLE = {
    *("model", "prompts", "prompts_field", "embeddings", "out", "steps"),
    *("mesh", "accumulate", "offload_optimizer", "remat"),
    *("log_every", "save_every", "keep_last", "keep_every", "max_skipped"),
    *("preview_every", "preview_prompts", "wandb_project"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A distillation run, complete. A recipe file states what differs from the defaults.

    Attributes:
      model: the teacher: a converted directory, or a diffusers folder or hub id, which is converted on first use.
      out: the run's directory; a run that is there already is resumed.
      guidance: teacher guidance scale used for distillation.
      prompts: a .txt, .jsonl or .parquet file, a folder of them, or a data set's hub id (see `data.prompts`).
      prompts_field: the field or column that has the prompt.
      embeddings: a cache that `arcflow embed-prompts` wrote; "" encodes the prompts as they come.
      images: a folder of real images to start from, with captions, which take the place of `prompts` (see
        `data.images.read_images`); "" starts from noise, without data.
      references: a folder of reference images with instructions, which take the place of `prompts` (see
        `data.images.read_images`), for a model that reads such images; the run starts from noise. "" for none.
      start_from: a student to begin from, with a new optimizer: a run's directory, or a released student's folder or
        hub id. Its EMA weights are taken. "" begins from the teacher.
      seed: of everything that is drawn.
      resolutions: (height, width) in pixels, one or several. The images of a training step have one of them, each as
        likely as the others; one that is listed twice is twice as likely. Prompts with sizes of their own (columns
        height and width) do not use it.
      batch, steps: examples in a training step, and number of training steps.
      accumulate: micro-batches of a training step, which are computed one after another to save memory.
      offload_optimizer: whether EMA weights and optimizer state are in host memory while the gradient is computed. It
        saves three times the adapter's size, and costs the transfer there and back in each training step.
      dtype: of the networks' arithmetic.
      mesh: sizes of the axes data, fsdp, tensor, sequence, where -1 takes what is left; or "auto", which fits devices
        and batch (see `parallel.mesh.auto_sizes`).
      remat: what the backward pass computes again: "full", each block; "attention", each block but its attention;
        "none", only what costs no matrix product. The less, the more memory it takes. "auto" chooses by the memory of
        the devices (see `training.remat`).
      log_every, save_every: training steps from one line of the log, or one checkpoint, to the next.
      keep_last: how many of the newest checkpoints stay.
      keep_every: checkpoints of training steps that are multiples of this are never deleted; 0 keeps none of them.
      max_skipped: how many training steps in a row may have a loss, gradient or update that is not finite. With more,
        the run stops at the next line of the log.
      preview_every: training steps from one sheet of teacher's and student's images to the next; 0 draws none.
      preview_prompts: what those images show. With `references` as many of their instructions, the first ones.
      wandb_project: of Weights & Biases, to log there as well; "" does not.
    """

    model: str
    out: str
    guidance: Guidance
    prompts: str = ""
    prompts_field: str = "prompt"
    embeddings: str = ""
    images: str = ""
    references: str = ""
    start_from: str = ""
    seed: Seed = 0
    resolutions: Sizes = ((1024, 1024),)
    batch: Batch = 16
    accumulate: Batch = 1
    offload_optimizer: bool = False
    steps: TrainingSteps = 10_000
    dtype: Precision = "bfloat16"
    mesh: Literal["auto"] | tuple[AxisSize, AxisSize, AxisSize, AxisSize] = "auto"
    remat: Choice = "auto"
    log_every: Period = 10
    save_every: Period = 500
    keep_last: Count = 2
    keep_every: TrainingSteps = 0
    max_skipped: TrainingSteps = 20
    preview_every: TrainingSteps = 0
    preview_prompts: tuple[str, ...] = ()
    wandb_project: str = ""
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    distillation: Distillation = dataclasses.field(default_factory=Distillation)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    ema: EmaConfig = dataclasses.field(default_factory=EmaConfig)

    def __post_init__(self):
        schema.check(self)
        if self.mesh != "auto":
            check_sizes(self.mesh)
        if self.batch % self.accumulate:
            raise UserError(f"batch {self.batch} does not divide into accumulate={self.accumulate} micro-batches")
        if self.images and self.references:
            raise UserError("images and references are both set: a run with reference images starts from noise")
        if not (self.prompts or self.images or self.references):
            raise UserError("the recipe has no prompts: set --config.prompts, or --config.images for real images")
        if self.preview_every and not self.preview_prompts:
            raise UserError(f"preview_every is {self.preview_every}, but preview_prompts is empty: list some, or set 0")
        if self.distillation.data_weight and not self.images:
            raise UserError("distillation.data_weight weights a loss on real images: name a folder of them as images")
        if self.distillation.mode_dropout and self.adapter.basis != "momentum":
            raise UserError(
                f"distillation.mode_dropout has to be 0 with the basis {self.adapter.basis}: it has no modes"
            )

    @property
    def other_prompts(self) -> list[str]:
        """What a run encodes beside the prompts that it is trained on."""
        guided = self.distillation.teacher_guidance == "cfg"
        return [
            *(self.preview_prompts if self.preview_every else ()),
            *([self.distillation.negative_prompt] if guided else ()),
        ]

    @property
    def largest(self) -> tuple[int, int]:
        """The (height, width) of most pixels, which takes most memory."""
        return max(self.resolutions, key=math.prod)

    @classmethod
    def from_config(cls, config: ConfigDict | dict[str, Any]) -> Recipe:
        """A recipe from its values, or from those that differ from the defaults.

        Raises:
          UserError: if the config lacks a key without a default, has an unknown key, or a value of the wrong type.
        """
        values = {key: checked(cls, key, value) for key, value in flatten(cls, ConfigDict(config).to_dict())}
        required = [field.name for field in dataclasses.fields(cls) if no_default(field)]
        if missing := [name for name in required if name not in values]:
            options = " ".join(f"--config.{name}=…" for name in missing)
            raise UserError(f"the recipe lacks {', '.join(missing)}: state it in its file, or set {options}")
        return cls(**{name: GROUPS[name](**x) if name in GROUPS else x for name, x in nest(values).items()})

    def resolved(self) -> dict[str, Any]:
        """All values, as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def write(self, run: Path) -> None:
        """Writes the recipe to a run's directory. Raises UserError if that is not possible."""
        try:
            if is_main():
                write_json(run / SETTINGS, self.resolved())
        except OSError as error:
            raise of_files(f"cannot write to {run}", error) from error

    def check_same(self, run: Path) -> None:
        """Raises UserError if the run was begun with other values of what decides its numbers."""
        if not (run / SETTINGS).exists():
            return
        stored, now = read_json(run / SETTINGS), dict(flatten(Recipe, self.resolved()))
        for group in GROUPS.keys() & stored.keys():
            schema.converted(dict[str, Any], stored[group], f"{run / SETTINGS}: {group}")
        known = {field.name for field in dataclasses.fields(Recipe)}
        before = dict(flatten(Recipe, {name: value for name, value in stored.items() if name in known}))
        if unknown := sorted((stored.keys() - known) | (before.keys() - now.keys())):
            raise UserError(f"{run / SETTINGS}: unknown {first_few(unknown)}: it is damaged, or of a later version")
        names = sorted(before.keys() & now.keys() - CHANGEABLE)
        for name in names:
            schema.converted(kind_of(Recipe, name), before[name], f"{run / SETTINGS}: {name}")
        changed = [
            f"{name} was {schema.shown(before[name])}, not {now[name]}"
            for name in names
            if before[name] != now[name] and now[name] is not None  # None is left to the model
        ]
        if changed:
            raise UserError(f"{run} holds a run of other settings: {', '.join(changed)}; name another --config.out")


GROUPS: dict[str, type] = {
    "adapter": AdapterConfig,
    "distillation": Distillation,
    "optimizer": OptimizerConfig,
    "ema": EmaConfig,
}


def defaults(cls: type = Recipe) -> dict[str, Any]:
    """The fields' defaults, those of groups in dicts of their own."""
    return {
        field.name: defaults(GROUPS[field.name]) if field.name in GROUPS else field.default
        for field in dataclasses.fields(cls)
        if not no_default(field)
    }


def read_config(recipe: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """All values of a recipe: the defaults, what its `get_config` states, and overrides.

    Args:
      recipe: `NAME[:VARIANT]` of a bundled recipe, or `FILE.py[:VARIANT]`. The variant is the argument of the file's
        `get_config`, which returns a ConfigDict of what differs from the defaults.
      overrides: "--config.key=value". A text is written as it stands, other values in Python's notation.

    Raises:
      UserError: if there is no such recipe, its file fails, or a key or a value is wrong.
    """
    name, *variant = recipe.split(":", 1)
    module = load(name)
    try:
        stated = ConfigDict(module.get_config(*variant)).to_dict()
    except UserError:
        raise
    except Exception as error:  # whatever the file's code raises
        raise UserError(f"recipe {one_line(recipe)}: {one_line(error)}") from error
    values = dict(flatten(Recipe, defaults()))
    values |= {key: checked(Recipe, key, value) for key, value in flatten(Recipe, stated)}
    for text in overrides:
        found = re.fullmatch(r"--config\.([\w.]+)=(.*)", text, re.DOTALL)
        if found is None:
            raise UserError(f"cannot read {text}: overrides have the form --config.key=value")
        key, value = found.groups()
        values[key] = parsed(Recipe, key, value)
    # `Recipe.from_config` checks types; ConfigDict knows one type a key
    return ConfigDict(nest(values), type_safe=False).lock()


def load(name: str) -> ModuleType:
    """The module of a bundled recipe, or of a file. Raises UserError if there is none, or importing it fails."""
    path = as_path(name)
    try:
        if path.suffix == ".py":
            if not path.is_file():
                raise UserError(f"recipe {name} does not exist")
            spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
        if name not in (known := bundled()):
            raise UserError(
                f"no recipe is called {schema.shown(name)}: known are {', '.join(known)}; a file's name ends in .py"
            )
        return importlib.import_module(f"arcflow_jax.configs.{name}")
    except UserError:
        raise
    except Exception as error:  # whatever the file's code raises
        raise UserError(f"recipe {name}: {one_line(error)}") from error


def bundled() -> list[str]:
    """The names of the recipes that come with the library."""
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))
