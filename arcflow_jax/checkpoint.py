"""Checkpoints of a distillation run: what was trained, never the base, which is named by its fingerprint.

    RUN/adapter.json         format, base fingerprint, adapter geometry, distillation settings
    RUN/checkpoints/STEP/    Orbax: adapter, ema, optimizer
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from arcflow_jax.arc_model import AdapterConfig
from arcflow_jax.distill import Distillation
from arcflow_jax.errors import UserError
from arcflow_jax.geometry import geometry, read_json
from arcflow_jax.train_state import TrainState

DESCRIPTION = "adapter.json"
FORMAT = "arcflow_jax adapter"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class AdapterDescription:
    """What RUN/adapter.json says."""

    base: str  # fingerprint of the teacher's transformer
    adapter: AdapterConfig
    distillation: Distillation

    def write(self, run: Path) -> None:
        values = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        aside = run / f"{DESCRIPTION}.tmp"
        aside.write_text(json.dumps(values, indent=2) + "\n")
        os.replace(aside, run / DESCRIPTION)

    @classmethod
    def read(cls, run: Path) -> AdapterDescription:
        """Raises UserError if `run` is not a run's directory or was written by another version."""
        if not (run / DESCRIPTION).is_file():
            raise UserError(f"{run} holds no adapter: it has no {DESCRIPTION}; arcflow train writes one")
        values = read_json(run / DESCRIPTION)
        if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
            raise UserError(f"{run / DESCRIPTION} is not of {FORMAT} version {VERSION}")
        where = str(run / DESCRIPTION)
        return cls(
            base=values["base"],
            adapter=geometry(AdapterConfig, values["adapter"], where),
            distillation=geometry(Distillation, values["distillation"], where),
        )

    def check_base(self, fingerprint: str, run: Path) -> None:
        """Raises UserError if the adapter was trained on another base than the one with this fingerprint."""
        if self.base != fingerprint:
            raise UserError(
                f"the adapter in {run} was trained on base {self.base[:12]}…, this model is {fingerprint[:12]}…: "
                "use the model that it was trained on"
            )


def as_dict(state: nnx.State) -> dict[str, Any]:
    """Nested dicts of arrays with string keys: the file format does not depend on Flax."""
    return nnx.to_pure_dict(state)


def as_state(abstract: nnx.State, values: dict[str, Any]) -> nnx.State:
    """`as_dict` undone, for a state of this structure."""
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, values)
    return state


def to_items(state: TrainState) -> dict[str, Any]:
    optimizer = jax.tree.map(as_dict, state.opt_state, is_leaf=lambda x: isinstance(x, nnx.State))
    return {"step": state.step, "adapter": as_dict(state.adapter), "ema": as_dict(state.ema), "optimizer": optimizer}


def from_items(like: TrainState, items: dict[str, Any]) -> TrainState:
    optimizer = jax.tree.map(
        lambda abstract, values: as_state(abstract, values) if isinstance(abstract, nnx.State) else values,
        like.opt_state,
        items["optimizer"],
        is_leaf=lambda x: isinstance(x, nnx.State),
    )
    return TrainState(
        items["step"], as_state(like.adapter, items["adapter"]), as_state(like.ema, items["ema"]), optimizer
    )


class Checkpoints:
    """The checkpoints of a run, newest last; saving goes on in the background."""

    def __init__(self, run: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self.manager = ocp.CheckpointManager((run / "checkpoints").absolute(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.manager.close()

    @property
    def latest(self) -> int | None:
        """The number of iterations of the newest complete checkpoint."""
        return self.manager.latest_step()

    def save(self, state: TrainState) -> None:
        step = int(state.step)
        if self.latest != step:
            self.manager.save(step, args=ocp.args.PyTreeSave(to_items(state)))

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, in the shapes and shardings of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, to_items(like))
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args)
        return from_items(like, self.manager.restore(self.latest, args=args))

    def restore_ema(self, abstract: nnx.State) -> nnx.State:
        """The averaged adapter alone, for sampling; `abstract` carries shapes and shardings."""
        wanted = {"ema": as_dict(abstract)}
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        return as_state(abstract, self.manager.restore(self.latest, args=args)["ema"])


def load_adapter(run: str | Path, fingerprint: str) -> tuple[AdapterDescription, Checkpoints]:
    """The description of a trained adapter, checked against its base, and its checkpoints. Raises UserError."""
    run = Path(run)
    description = AdapterDescription.read(run)
    description.check_base(fingerprint, run)
    checkpoints = Checkpoints(run)
    if checkpoints.latest is None:
        raise UserError(f"{run} holds no checkpoint yet")
    return description, checkpoints
