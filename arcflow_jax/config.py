"""Recipes: `configs/NAME.py[:ARG]` plus overrides, to a checked `Recipe`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from absl import flags
from ml_collections import ConfigDict, config_flags

from arcflow_jax.arc_model import AdapterConfig
from arcflow_jax.distill import Distillation
from arcflow_jax.errors import UserError
from arcflow_jax.optim import OptimizerConfig
from arcflow_jax.train_state import EmaConfig

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A distillation run, complete.

    Attributes:
      model: the converted teacher's directory.
      prompts: a text file, one prompt a line.
      images: a folder of real pictures to start from, with captions, which take the place of `prompts` (see
        `pictures.read_pictures`); "" starts from noise, without data.
      out: the run's directory; a run that is there already goes on.
      seed: of everything that is drawn.
      height, width: of the pictures, in pixels.
      guidance: scale that the teacher is imitated at.
      batch, steps: examples an iteration, and iterations.
      dtype: that the networks compute in.
      mesh: sizes of the axes data, fsdp, tensor, sequence; -1 takes what is left.
      log_every, save_every: iterations.
    """

    model: str
    prompts: str
    images: str
    out: str
    seed: int
    height: int
    width: int
    guidance: float
    batch: int
    steps: int
    dtype: str
    mesh: tuple[int, ...]
    log_every: int
    save_every: int
    adapter: AdapterConfig
    distillation: Distillation
    optimizer: OptimizerConfig
    ema: EmaConfig

    def __post_init__(self):
        for name, least in (("batch", 1), ("steps", 0), ("log_every", 1), ("save_every", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, but has to be at least {least}")
        if self.distillation.data_weight and not self.images:
            raise UserError("distillation.data_weight is of a term on real pictures: name a folder of them as images")

    @classmethod
    def of(cls, config: ConfigDict) -> Recipe:
        """Raises UserError if the config lacks a key or has one that no recipe knows."""
        return _fill(cls, config.to_dict(), "config")


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
