"""Checkpoints of a distillation run: what was trained, never the base, which is named by its fingerprint.

RUN/adapter.json         format, base fingerprint and geometry, adapter geometry, distillation settings
RUN/checkpoints/STEP/    Orbax: step, adapter, ema, optimizer; of a student that was trained elsewhere ema alone
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
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.geometry import geometry, read_json
from arcflow_jax.train_state import TrainState

DESCRIPTION = "adapter.json"
FORMAT = "arcflow_jax adapter"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class AdapterDescription:
    """What RUN/adapter.json says.

    Attributes:
      base: fingerprint of the teacher's transformer.
      adapter, distillation: what was trained, and for what.
      guidance: scale that the teacher was imitated at.
      transformer: the base's entry in its model.json, class and config, from which an export takes the geometry.
        A run that was begun before this was kept has none until it goes on. The fingerprint identifies the base.
    """

    base: str
    adapter: AdapterConfig
    distillation: Distillation
    guidance: float
    transformer: dict[str, Any] | None = dataclasses.field(default=None, compare=False)

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
            guidance=values["guidance"],
            transformer=values.get("transformer"),
        )

    def check_base(self, fingerprint: str, run: Path) -> None:
        """Raises UserError if the adapter was trained on another base than the one with this fingerprint."""
        if self.base != fingerprint:
            raise UserError(
                f"the adapter in {run} was trained on base {self.base[:12]}…, this model is {fingerprint[:12]}…: "
                "use the model that it was trained on"
            )


def is_state(x: Any) -> bool:
    return isinstance(x, nnx.State)


def to_dicts(tree: Any) -> Any:
    """A tree with plain dicts of arrays for its NNX states: the file format does not depend on Flax."""
    return jax.tree.map(lambda x: nnx.to_pure_dict(x) if is_state(x) else x, tree, is_leaf=is_state)


def from_dicts(like: Any, values: Any) -> Any:
    """`to_dicts` undone, for a tree of the structure of `like`."""

    def one(like: Any, value: Any) -> Any:
        if not is_state(like):
            return value
        state = jax.tree.map(lambda x: x, like)  # a copy, whose arrays are replaced
        nnx.replace_by_pure_dict(state, value)
        return state

    return jax.tree.map(one, like, values, is_leaf=is_state)


def items(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {"step": state.step, "adapter": state.adapter, "ema": state.ema, "optimizer": state.opt_state}


class Checkpoints:
    """The checkpoints of a run, newest last; saving goes on in the background."""

    def __init__(self, run: Path, keep: int = 2):
        self.run = run
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        directory, handler = (run / "checkpoints").absolute(), ocp.PyTreeCheckpointHandler()
        self.manager = ocp.CheckpointManager(directory, options=options, item_handlers=handler)

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
            self.manager.save(step, args=ocp.args.PyTreeSave(to_dicts(items(state))))

    def save_ema(self, ema: nnx.State) -> None:
        """A finished student, which has no optimizer to go on with: the averaged adapter alone."""
        self.manager.save(0, args=ocp.args.PyTreeSave({"ema": to_dicts(ema)}))

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, in the shapes and shardings of `like`."""
        restored = items(like)
        for name, value in self._read(to_dicts(restored)).items():
            restored[name] = from_dicts(restored[name], value)
        return TrainState(restored["step"], restored["adapter"], restored["ema"], restored["optimizer"])

    def restore_ema(self, abstract: nnx.State) -> nnx.State:
        """The averaged adapter alone, for sampling; `abstract` carries shapes and shardings."""
        return from_dicts(abstract, self._read({"ema": to_dicts(abstract)})["ema"])

    def restore_raw(self, abstract: nnx.State) -> nnx.State:
        """The adapter as the last iteration left it. Raises UserError for a student of which only `ema` was kept."""
        if "adapter" not in self.manager.item_metadata(self.latest).tree:
            raise UserError(f"{self.run} holds averaged weights only: leave --raw out")
        return from_dicts(abstract, self._read({"adapter": to_dicts(abstract)})["adapter"])

    def _read(self, like: dict[str, Any]) -> dict[str, Any]:
        """The named parts of the newest checkpoint, with the shapes, dtypes and shardings of `like`."""
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), like)
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        try:
            return self.manager.restore(self.latest, args=args)
        except Exception as error:  # Orbax and TensorStore raise all sorts
            raise UserError(f"checkpoint {self.latest} in {self.run} is damaged: {one_line(error)}") from error


def sharding_of(x: Any) -> jax.sharding.Sharding:
    return getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def load_adapter(run: str | Path, fingerprint: str | None = None) -> tuple[AdapterDescription, Checkpoints]:
    """The description of a trained adapter, checked against the base if one is named, and its checkpoints.

    Raises:
      UserError: if `run` holds no adapter, one of another base, or no checkpoint.
    """
    run = Path(run)
    description = AdapterDescription.read(run)
    if fingerprint is not None:
        description.check_base(fingerprint, run)
    # Looked for first, because the manager would make the directory
    if not (run / "checkpoints").is_dir() or (checkpoints := Checkpoints(run)).latest is None:
        raise UserError(f"{run} holds no checkpoint yet")
    return description, checkpoints
