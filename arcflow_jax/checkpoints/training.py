"""Checkpoints of a distillation run: what was trained. The base is named by its fingerprint, never copied.

RUN/adapter.json         format, the base's fingerprint and config, adapter config, distillation settings, and SHA-256
                         of all that
RUN/checkpoints/STEP/    Orbax: step, adapter, ema, optimizer, skipped, and a checksum of each. Of a student that was
                         trained elsewhere, ema and its checksum only.

Random numbers and the order of the data follow from the recipe's seed and the step, so they are not stored. A
checkpoint gets its name when it is complete. The next run removes what a killed save has left.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from arcflow_jax import schema
from arcflow_jax.arrays.log import of_a_reader, raised_later, without
from arcflow_jax.arrays.names import tree_in_memory, tree_on_disk
from arcflow_jax.arrays.orbax import Arrays, as_os_error, check_name, clear_cause, handler, misfits, place
from arcflow_jax.checkpoints.aside import COMMITTED, move_aside
from arcflow_jax.errors import NetworkError, UserError, cannot_load, cause_of, first_few, one_line
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.models.model_directory import ComponentDescription
from arcflow_jax.networks.student import AdapterConfig
from arcflow_jax.parallel.offload import to_device
from arcflow_jax.schema import SHA256, Guidance
from arcflow_jax.storage.files import file_size, read_own, write_own
from arcflow_jax.storage.paths import as_path, in_bucket, remove_tree

T = TypeVar("T")

DESCRIPTION = "adapter.json"
FORMAT = "arcflow_jax adapter"
VERSION = 2
# Defaults are for recipes: of a trained adapter, what decides its shapes and its sampling has to be there
NEEDED = {
    "adapter": {"modes", "rank", "alpha", "dropout", "targets"},
    "distillation": {"nfe", "shift", "final_step_ratio"},
}
MOST_BYTES = 2**36  # of a checkpoint's file; Orbax begins a new one after 2 GB
MOST_TRIES = 20  # of a reader, whose checkpoint a run may delete meanwhile


@dataclasses.dataclass(frozen=True)
class AdapterDescription:
    """The content of RUN/adapter.json.

    Attributes:
      base: fingerprint of the teacher's transformer.
      adapter, distillation: what was trained, and the settings of the distillation.
      guidance: teacher guidance scale used for distillation.
      transformer: the base's entry in its model.json, with class and config, which an export needs. None in a run of
        an early version until it is resumed. It does not identify the base: the fingerprint does.
      pipeline: class of the base's pipeline in diffusers; None in a run of an early version.
    """

    base: SHA256
    adapter: AdapterConfig
    distillation: Distillation
    guidance: Guidance
    transformer: ComponentDescription | None = dataclasses.field(default=None, compare=False)
    pipeline: str | None = dataclasses.field(default=None, compare=False)

    @staticmethod
    def flat(values: dict[str, Any]) -> dict[str, Any]:
        """The same. Raises UserError if a part lacks what has to be there."""
        for part, names in NEEDED.items():
            given = {name for name, value in schema.nested(values, part).items() if value is not None}
            if part in values and (missing := sorted(names - given)):
                raise UserError(f"missing {', '.join(f'{part}.{name}' for name in missing)}")
        return values

    def write(self, run: Path) -> None:
        """Writes RUN/adapter.json. Raises OSError."""
        write_own(run / DESCRIPTION, self, FORMAT, VERSION)

    @classmethod
    def read(cls, run: Path) -> AdapterDescription:
        """Reads RUN/adapter.json.

        Raises:
          UserError: if there is none, it is of another format or version, a part is missing or has the wrong type.
        """
        file = run / DESCRIPTION
        if not file.is_file():
            raise UserError(f"{run} holds no adapter: it has no {DESCRIPTION}; arcflow train writes one")
        return read_own(cls, file, FORMAT, VERSION)

    def check_base(self, fingerprint: str, run: Path) -> None:
        """Raises UserError if the adapter was trained on another base than the one with this fingerprint."""
        if self.base != fingerprint:
            raise UserError(
                f"the adapter in {run} was trained on base {self.base[:12]}…, this model is {fingerprint[:12]}…: "
                "use the model that it was trained on"
            )


def is_state(x: Any) -> bool:
    """Whether a node of a tree is an NNX state."""
    return isinstance(x, nnx.State)


def to_dicts(tree: Any) -> Any:
    """A tree with plain dicts of arrays in place of NNX states: the file format does not depend on Flax."""
    return jax.tree.map(lambda x: tree_on_disk(nnx.to_pure_dict(x)) if is_state(x) else x, tree, is_leaf=is_state)


def from_dicts(like: Any, values: Any) -> Any:
    """The inverse of `to_dicts`, for a tree of the structure of `like`."""

    def one(like: Any, value: Any) -> Any:
        if not is_state(like):
            return value
        state = jax.tree.map(lambda x: x, like)  # a copy, whose arrays are replaced
        nnx.replace_by_pure_dict(state, tree_in_memory(value))
        return state

    return jax.tree.map(one, like, values, is_leaf=is_state)


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """The sum of all words of a tree modulo 2³². Any changed bit changes it; the sharding does not.

    The file format has no checksum of the numbers themselves.
    """

    def words(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)

    return sum((jnp.sum(words(x), dtype=jnp.uint32) for x in jax.tree.leaves(tree)), jnp.uint32(0))


def patiently(list_checkpoints: Callable[[], T]) -> T:
    """Tries again if a run deletes a checkpoint while they are listed."""
    for _ in range(MOST_TRIES):
        # Orbax asks whether a path exists, then whether it is a folder: one that goes between the two is neither
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return list_checkpoints()
    return list_checkpoints()


class Checkpoints:
    """The checkpoints of a run. They are saved in the background; all are saved when the `with` block ends.

    Args:
      run: the run's directory.
      keep_last: how many of the newest checkpoints are kept.
      keep_every: checkpoints whose step is divisible by this are kept as well; 0 keeps none of them.
      read_only: writes and removes nothing: another process may be writing to the same run.
    """

    def __init__(self, run: Path, keep_last: int = 2, keep_every: int = 0, read_only: bool = False):
        self.run, self.read_only = run, read_only
        self._log, self._arrays = contextlib.ExitStack(), Arrays()
        keep = AnyPreservationPolicy([LatestN(keep_last), *([EveryNSteps(keep_every)] if keep_every else [])])
        # Orbax's own read_only would log three warnings; without a save or delete it has no other effect
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, create=not read_only, cleanup_tmp_directories=not read_only
        )
        directory = place(run / "checkpoints")
        patiently(lambda: refuse_odd_files(directory))
        if not read_only:
            check_name(directory)
        with self._managing(), without(of_a_reader):
            self.manager = patiently(
                lambda: ocp.CheckpointManager(directory, options=options, item_handlers=handler(self._arrays))
            )

    def __enter__(self) -> Checkpoints:
        if not self.read_only:
            self._log.enter_context(without(raised_later))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            with self._managing():
                self.manager.close()
        except UserError:
            if kind is None:  # otherwise the first error is raised
                raise
        finally:
            self._arrays.settle()
            self._log.close()
            # In a bucket there are none: what has no mark yet has its own name
            if not self.read_only and jax.process_index() == 0 and not in_bucket(self.run):
                for failed in (self.run / "checkpoints").glob("*.orbax-checkpoint-tmp"):  # they may fill the disk
                    remove_tree(failed)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, None if there is none."""
        with without(of_a_reader):
            return self.manager.latest_step()

    def save(self, step: int, items: dict[str, Any]) -> None:
        """Saves a run's state after `step` training steps. Raises UserError if this or the last save fails."""
        if self.latest != step:
            self._write(step, items)

    def save_ema(self, ema: nnx.State) -> None:
        """Saves a finished student, which has EMA weights only and cannot be resumed. Raises UserError as `save`."""
        self._write(0, {"ema": ema})

    def wait(self) -> None:
        """Waits until all saves are complete. Raises UserError if one fails."""
        with self._managing():
            self.manager.wait_until_finished()

    def check(self) -> None:
        """Raises UserError if a save in the background has failed. Does not wait for one."""
        with self._managing():
            # Orbax's check_for_errors finds nothing: the thread that completes a save has taken the error
            if not self.manager.is_saving_in_progress():
                self.manager.wait_until_finished()

    def _write(self, step: int, tree: dict[str, Any]) -> None:
        tree = to_dicts(tree)
        with self._managing():
            sums = {name: checksum(to_device(value)) for name, value in tree.items()}
            self.manager.save(step, args=ocp.args.PyTreeSave({**tree, "checksum": sums}))

    @contextlib.contextmanager
    def _managing(self) -> Iterator[None]:
        """Inside the `with` block, any error of Orbax or TensorStore becomes a UserError: also one of an older save."""
        try:
            yield
        except Exception as error:
            told = as_os_error(error, self.run)
            reason = one_line(error if told is None else told.strerror)
            kind = NetworkError if cause_of(error) == "network" else UserError
            there = []
            with contextlib.suppress(OSError):  # a bucket that does not answer: that is the error to tell
                there = [int(path.name) for path in (self.run / "checkpoints").glob("*") if is_complete(path)]
            kept = f"; checkpoint {max(there)} is intact" if there else ""
            failed = "cannot list the checkpoints of" if self.read_only else "cannot write a checkpoint to"
            raise kind(f"{failed} {self.run}{kept}: {reason}") from error

    def restore(self, like: dict[str, Any], step: int | None = None) -> dict[str, Any]:
        """The state in a checkpoint, with the shapes and shardings of `like`.

        Args:
          like: arrays, or shapes with shardings.
          step: which checkpoint; newer ones are moved aside (see `aside`). By default the newest.

        Raises:
          UserError: if there is no such checkpoint, it does not fit, or it cannot be read.
        """
        step = self.latest if step is None else step
        steps = sorted(self.manager.all_steps())
        if step not in steps:
            raise UserError(f"{self.run} has no checkpoint {step}; there are {', '.join(map(str, steps)) or 'none'}")
        read = self._read(to_dicts(like), step)
        restored = {name: from_dicts(value, read[name]) for name, value in like.items()}
        if newer := steps[steps.index(step) + 1 :]:  # only now: this checkpoint might have been damaged
            with self._managing():
                move_aside(self.run, newer)
                self.manager.reload()
        return restored

    def restore_adapter(self, abstract: nnx.State, raw: bool = False) -> nnx.State:
        """The adapter in the newest checkpoint, for sampling; `abstract` has its shapes and shardings.

        Args:
          raw: the weights after the last training step instead of the EMA weights.

        Raises:
          UserError: if the checkpoint is damaged, or holds EMA weights only and `raw` is asked for.
        """
        name = "adapter" if raw else "ema"

        def read(step: int) -> nnx.State:
            if raw and name not in self._stored(step):
                raise UserError(f"{self.run} holds EMA weights only: leave --raw out")
            return from_dicts(abstract, self._read({name: to_dicts(abstract)}, step)[name])

        return self._newest(read)

    def _newest(self, read: Callable[[int], T]) -> T:
        """Returns `read(step)` for the newest checkpoint. Tries again if a run deletes that checkpoint meanwhile."""
        for _ in range(MOST_TRIES):
            step = self.latest
            if step is None:
                break
            try:
                return read(step)
            except UserError:
                with without(of_a_reader):
                    patiently(self.manager.reload)
                if self.latest == step:
                    raise
        raise UserError(f"the checkpoints of {self.run} are replaced faster than they can be read: try again")

    def everything(self, step: int) -> dict[str, Any]:
        """All parts of a checkpoint, nested dicts of arrays. Raises UserError if it is damaged."""
        tree = self._stored(step)
        tree.pop("checksum", None)
        return self._read(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree), step)

    def _stored(self, step: int) -> dict[str, Any]:
        """The shapes of a checkpoint's arrays, by part."""
        with self._reading(step):
            return dict(self.manager.item_metadata(step).tree)

    def _read(self, like: dict[str, Any], step: int) -> dict[str, Any]:
        """Those parts of a checkpoint that `like` names, with its shapes, dtypes and shardings."""
        stored = self._stored(step)
        if wrong := misfits(like, stored):
            raise UserError(
                f"checkpoint {step} in {self.run} does not fit this model and recipe: {len(wrong)} arrays differ "
                f"({first_few(wrong)})"
            )
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), like)
        if "checksum" in stored:  # older ones have none
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
        """Inside the `with` block, any error of Orbax or TensorStore becomes a UserError."""
        with without(of_a_reader):
            try:
                refuse_odd_files(self.run / "checkpoints" / str(step))
                yield
            except Exception as error:
                older = [other for other in self.manager.all_steps() if other < step]
                hint = f"; arcflow train --step {max(older)} resumes from the one before" if older else ""
                cause = clear_cause(error, self.run)
                raise cannot_load(f"checkpoint {step} in {self.run}", cause, hint) from error


def is_complete(checkpoint: Path) -> bool:
    """Whether a path is a checkpoint. On a disk it has its name once it is complete, in a bucket it has a mark."""
    return checkpoint.name.isdigit() and (not in_bucket(checkpoint) or (checkpoint / COMMITTED).exists())


def refuse_odd_files(checkpoint: Path) -> None:
    """Raises UserError if there is a file below a path that TensorStore cannot read: reading a pipe would never end.

    A file that does not fit in memory would end the process, as TensorStore reads small files as a whole.
    """
    if in_bucket(checkpoint):  # which holds nothing but objects
        for path, size in checkpoint.sizes().items():
            if size > MOST_BYTES:
                raise UserError(f"{path} has {size} bytes, but at most {MOST_BYTES} are read of such a file")
        return
    for path in checkpoint.rglob("*"):
        if path.exists() and not path.is_dir():
            try:
                file_size(path, MOST_BYTES)
            except UserError:
                if path.exists():  # a run that saves removes its temporary files
                    raise


def sharding_of(x: Any) -> jax.sharding.Sharding:
    """The sharding of an array or shape; by default the first device."""
    return getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def load_adapter(run: str | Path, fingerprint: str | None = None) -> tuple[AdapterDescription, Checkpoints]:
    """The description of a trained adapter, and its checkpoints, to be read.

    Args:
      run: the run's directory.
      fingerprint: of the base that the adapter has to be of; by default any.

    Raises:
      UserError: if `run` holds no adapter, one of another base, or no checkpoint.
    """
    run = as_path(run)
    description = AdapterDescription.read(run)
    if fingerprint is not None:
        description.check_base(fingerprint, run)
    if not (run / "checkpoints").is_dir() or (checkpoints := Checkpoints(run, read_only=True)).latest is None:
        raise UserError(f"{run} holds no checkpoint yet")
    return description, checkpoints
