"""Checkpoints of a distillation run: what was trained, never the base, which is named by its fingerprint.

RUN/adapter.json         format, base fingerprint and geometry, adapter geometry, distillation settings
RUN/checkpoints/STEP/    Orbax: step, adapter, ema, optimizer, skipped; of a student that was trained elsewhere ema
                         alone; and a checksum of each

Random numbers and the order of the data follow from the recipe's seed and the step, so neither is stored again. A
checkpoint has its name once it is complete, not before: what a killed save leaves is cleared by the next run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from arcflow_jax.checkpoints.names import tree_in_memory, tree_on_disk
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.networks.student import AdapterConfig
from arcflow_jax.storage.files import parse_config, read_json, write_json

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
        write_json(run / DESCRIPTION, {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)})

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
            adapter=parse_config(AdapterConfig, values["adapter"], where),
            distillation=parse_config(Distillation, values["distillation"], where),
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
    return jax.tree.map(lambda x: tree_on_disk(nnx.to_pure_dict(x)) if is_state(x) else x, tree, is_leaf=is_state)


def from_dicts(like: Any, values: Any) -> Any:
    """`to_dicts` undone, for a tree of the structure of `like`."""

    def one(like: Any, value: Any) -> Any:
        if not is_state(like):
            return value
        state = jax.tree.map(lambda x: x, like)  # a copy, whose arrays are replaced
        nnx.replace_by_pure_dict(state, tree_in_memory(value))
        return state

    return jax.tree.map(one, like, values, is_leaf=is_state)


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """Of all bits of a tree, however it is split: the sum of its words modulo 2³², which a changed bit changes.

    The file format has none over the numbers themselves.
    """

    def words(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)

    return sum((jnp.sum(words(x), dtype=jnp.uint32) for x in jax.tree.leaves(tree)), jnp.uint32(0))


def not_orbax(record: logging.LogRecord) -> bool:
    """Keeps Orbax from logging an error, with its traceback, that is raised here as well."""
    return "orbax" not in record.pathname


def closed_loop(unraisable: Any) -> None:
    """Keeps quiet about the reads and writes that Orbax leaves behind when one fails, which is told by itself."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


class Checkpoints:
    """The checkpoints of a run, newest last; saving goes on in the background, and is done when the `with` block ends.

    Args:
      run: the run's directory.
      keep_last: how many of the newest stay.
      keep_every: those whose number this divides stay as well, if it is not 0.
      read_only: leaves alone what another process may be writing.
    """

    def __init__(self, run: Path, keep_last: int = 2, keep_every: int = 0, read_only: bool = False):
        self.run, self.read_only = run, read_only
        logging.getLogger("absl").addFilter(not_orbax)
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = closed_loop
        keep = AnyPreservationPolicy([LatestN(keep_last), *([EveryNSteps(keep_every)] if keep_every else [])])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, cleanup_tmp_directories=not read_only, read_only=read_only
        )
        directory, handler = (run / "checkpoints").absolute(), ocp.PyTreeCheckpointHandler()
        with self._writing():
            self.manager = ocp.CheckpointManager(directory, options=options, item_handlers=handler)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            with self._writing():
                self.manager.close()
        except UserError:
            if kind is None:  # otherwise the first error is the one to be told
                raise
        finally:
            if not self.read_only and jax.process_index() == 0:
                for failed in (self.run / "checkpoints").glob("*.orbax-checkpoint-tmp"):  # they may fill the disk
                    shutil.rmtree(failed, ignore_errors=True)

    @property
    def latest(self) -> int | None:
        """The number of iterations of the newest complete checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, items: dict[str, Any]) -> None:
        """Saves what a run has after `step` steps. Raises UserError if this or the last save fails."""
        if self.latest != step:
            self._write(step, items)

    def save_ema(self, ema: nnx.State) -> None:
        """A finished student, which has no optimizer to go on with: the averaged adapter alone. Raises as `save`."""
        self._write(0, {"ema": ema})

    def check(self) -> None:
        """Raises UserError if a save that went on in the background has failed."""
        with self._writing():
            self.manager.check_for_errors()

    def _write(self, step: int, tree: dict[str, Any]) -> None:
        tree = to_dicts(tree)
        with self._writing():
            sums = {name: checksum(value) for name, value in tree.items()}
            self.manager.save(step, args=ocp.args.PyTreeSave({**tree, "checksum": sums}))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what Orbax and TensorStore raise, now or for what they did in the background, into a UserError."""
        try:
            yield
        except Exception as error:
            full = "No space left on device" in str(error)
            reason = "no space left on the device" if full else one_line(error)
            there = [int(path.name) for path in (self.run / "checkpoints").glob("*") if path.name.isdigit()]
            kept = f"; checkpoint {max(there)} is intact" if there else ""
            raise UserError(f"cannot write a checkpoint to {self.run}{kept}: {reason}") from error

    def restore(self, like: dict[str, Any], step: int | None = None) -> dict[str, Any]:
        """A checkpoint, in the shapes and shardings of `like`: the newest, or that of `step`, which deletes newer ones.

        Raises:
          UserError: if there is no such checkpoint, or it is damaged.
        """
        step = self.latest if step is None else step
        steps = sorted(self.manager.all_steps())
        if step not in steps:
            raise UserError(f"{self.run} has no checkpoint {step}; there are {', '.join(map(str, steps))}")
        read = self._read(to_dicts(like), step)
        restored = {name: from_dicts(value, read[name]) for name, value in like.items()}
        for newer in steps[steps.index(step) + 1 :]:  # not before: this one might have been damaged
            self.manager.delete(newer)
        return restored

    def restore_adapter(self, abstract: nnx.State, raw: bool = False) -> nnx.State:
        """The adapter of the newest checkpoint, for sampling; `abstract` carries shapes and shardings.

        Args:
          raw: as the last iteration left it, instead of averaged.

        Raises:
          UserError: if the checkpoint is damaged, or it is of a student of which only the average was kept.
        """
        name = "adapter" if raw else "ema"
        if raw and name not in self._names(self.latest):
            raise UserError(f"{self.run} holds averaged weights only: leave --raw out")
        return from_dicts(abstract, self._read({name: to_dicts(abstract)}, self.latest)[name])

    def _names(self, step: int) -> set[str]:
        """What a checkpoint holds."""
        with self._reading(step):
            return set(self.manager.item_metadata(step).tree)

    def _read(self, like: dict[str, Any], step: int) -> dict[str, Any]:
        """The named parts of a checkpoint, with the shapes, dtypes and shardings of `like`."""
        names = self._names(step)
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), like)
        if "checksum" in names:  # older ones have none
            wanted["checksum"] = dict.fromkeys(like, jax.ShapeDtypeStruct((), jnp.uint32))
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        with self._reading(step):
            read = self.manager.restore(step, args=args)
            sums = read.pop("checksum", {})
            if wrong := [name for name, value in sums.items() if int(value) != int(checksum(read[name]))]:
                raise ValueError(f"the checksum of {', '.join(wrong)} is wrong")
        return read

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns what Orbax and TensorStore raise, all sorts, into a UserError."""
        try:
            yield
        except Exception as error:
            older = [other for other in self.manager.all_steps() if other < step]
            hint = f"; arcflow train --step {max(older)} goes on from the one before" if older else ""
            reason = one_line(error).partition(" See full TensorStore details")[0]
            raise UserError(f"checkpoint {step} in {self.run} is damaged{hint}: {reason}") from error


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
    if not (run / "checkpoints").is_dir() or (checkpoints := Checkpoints(run, read_only=True)).latest is None:
        raise UserError(f"{run} holds no checkpoint yet")
    return description, checkpoints
