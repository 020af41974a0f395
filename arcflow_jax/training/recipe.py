"""Recipes: `configs/NAME.py[:ARG]` plus overrides, to a checked `Recipe`."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from arcflow_jax.errors import UserError
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.networks.student import AdapterConfig
from arcflow_jax.storage.files import read_json, write_json
from arcflow_jax.training.optimizer import OptimizerConfig
from arcflow_jax.training.state import EmaConfig

T = TypeVar("T")
SETTINGS = "config.json"  # in the run's directory: the recipe with all overrides
# What may be changed when a run goes on: where things are, for how long and how often. The rest decides its numbers.
CHANGEABLE = {
    *(
        "model",
        "prompts",
        "prompts_field",
        "embeddings",
        "out",
        "mesh",
        "steps",
        "log_every",
        "save_every",
        "keep_last",
        "keep_every",
    ),
    *("max_skipped", "preview_every", "preview_prompts", "wandb_project"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A distillation run, complete.

    Attributes:
      model: the converted teacher's directory.
      prompts: a .txt, .jsonl or .parquet file, a folder of them, or a data set's hub id (see `prompt_sources`).
      prompts_field: the field or column that has the prompt.
      embeddings: a cache that `arcflow embed-prompts` wrote; "" encodes the prompts as they come.
      images: a folder of real pictures to start from, with captions, which take the place of `prompts` (see
        `images.read_images`); "" starts from noise, without data.
      out: the run's directory; a run that is there already goes on.
      seed: of everything that is drawn.
      resolutions: (height, width) in pixels, one or several; an iteration's pictures have one of them, each as likely
        as the others; one that is listed twice is twice as likely.
      guidance: scale that the teacher is imitated at.
      batch, steps: examples an iteration, and iterations.
      dtype: that the networks compute in.
      mesh: sizes of the axes data, fsdp, tensor, sequence; -1 takes what is left.
      log_every, save_every: iterations.
      keep_last: how many of the newest checkpoints stay.
      keep_every: checkpoints of iterations that this divides stay for good; 0 keeps none of them.
      max_skipped: how many iterations in a row may have a loss or gradient that is not finite. With more the run
        stops, where it logs.
      preview_every: iterations from one picture of teacher and student to the next; 0 makes none.
      preview_prompts: what the pictures show.
      wandb_project: of Weights & Biases, to log there as well; "" does not.
    """

    model: str
    prompts: str
    prompts_field: str
    embeddings: str
    images: str
    out: str
    seed: int
    resolutions: tuple[tuple[int, int], ...]
    guidance: float
    batch: int
    steps: int
    dtype: str
    mesh: tuple[int, ...]
    log_every: int
    save_every: int
    keep_last: int
    keep_every: int
    max_skipped: int
    preview_every: int
    preview_prompts: tuple[str, ...]
    wandb_project: str
    adapter: AdapterConfig
    distillation: Distillation
    optimizer: OptimizerConfig
    ema: EmaConfig

    def __post_init__(self):
        least = {"seed": 0, "batch": 1, "steps": 0, "log_every": 1, "save_every": 1}
        least |= {"keep_last": 1, "keep_every": 0, "max_skipped": 0, "preview_every": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"{name} is {getattr(self, name)}, but has to be at least {value}")
        if self.preview_every and not self.preview_prompts:
            raise UserError("preview_every asks for pictures, and preview_prompts says nothing of what they show")
        if not self.resolutions or not all(map(is_size, self.resolutions)):
            raise UserError(
                f"resolutions is {self.resolutions}, but has to list sizes as (height, width), e.g. ((1024, 1024),)"
            )
        if self.distillation.data_weight and not self.images:
            raise UserError("distillation.data_weight is of a term on real pictures: name a folder of them as images")
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
    def of(cls, config: ConfigDict) -> Recipe:
        """Raises UserError if the config lacks a key or has one that no recipe knows."""
        return _fill(cls, config.to_dict(), "config")

    def resolved(self) -> dict[str, Any]:
        """All values, as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def write(self, run: Path) -> None:
        """Keeps the recipe in a run's directory. Raises UserError if that is not possible."""
        try:
            if jax.process_index() == 0:
                write_json(run / SETTINGS, self.resolved())
        except OSError as error:
            raise UserError(f"cannot write to {run}: {error.strerror}") from None

    def check_same(self, run: Path) -> None:
        """Raises UserError if the run was begun with other values of what decides its numbers."""
        if not (run / SETTINGS).exists():
            return
        before, now = _flat(read_json(run / SETTINGS)), _flat(self.resolved())
        changed = [
            f"{name} was {before[name]}, not {now[name]}"
            for name in sorted(before.keys() & now.keys() - CHANGEABLE)
            if before[name] != now[name]
        ]
        if changed:
            raise UserError(f"{run} holds a run of other settings: {', '.join(changed)}; name another --config.out")


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def is_size(value: Any) -> bool:
    """Whether a value is a pair of whole numbers."""
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(side, int) for side in value)


def _fill(cls: type[T], values: dict[str, Any], where: str) -> T:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise UserError(f"{where} has unknown keys {', '.join(unknown)}; known are {', '.join(fields)}")
    if missing := sorted(fields.keys() - values.keys()):
        raise UserError(f"{where} lacks {', '.join(missing)}")
    nested = {"adapter": AdapterConfig, "distillation": Distillation, "optimizer": OptimizerConfig, "ema": EmaConfig}
    return cls(
        **{
            name: _fill(nested[name], value, f"{where}.{name}") if name in nested and isinstance(value, dict) else value
            for name, value in values.items()
        }
    )


def read_config(file: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of `FILE.py[:ARG]` with overrides of the form `--config.a.b=c`.

    Raises:
      UserError: if the file is missing or broken, or an override names an unknown key or has the wrong type.
    """
    path = file.split(":", 1)[0]
    if not Path(path).is_file():
        raise UserError(f"config {path} does not exist")
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    arguments = ["arcflow", f"--config={file}", *overrides]
    try:
        # ml_collections looks for the overrides in sys.argv, whatever it is called with
        with mock.patch.object(sys, "argv", arguments):
            rest = values(arguments)[1:]
    # Quoted whole: what went wrong in a config file stands at the end
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{' '.join(str(error).split())} (overrides have the form --config.key=value)") from None
    if rest:
        raise UserError(f"cannot read {' '.join(rest)}: overrides have the form --config.key=value")
    return holder.value
