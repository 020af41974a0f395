"""Checks in full what was written: every tensor is read, is finite, and has the values that it was written with.

Loading a model verifies the parts that it reads. This reads all of a model, run, export or cache of embeddings.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from arcflow_jax.arrays.orbax import handler, place
from arcflow_jax.checkpoints.student_formats import CONFIG, read_export
from arcflow_jax.checkpoints.training import DESCRIPTION as ADAPTER
from arcflow_jax.checkpoints.training import load_adapter
from arcflow_jax.console import progress_bar
from arcflow_jax.data.embeddings import DESCRIPTION as EMBEDDINGS
from arcflow_jax.data.embeddings import checked_row, read_cache, shard_path
from arcflow_jax.data.tokenizers import load_tokenizer
from arcflow_jax.errors import NetworkError, UserError
from arcflow_jax.models.model_directory import (
    CHECKPOINT,
    ArrayDigest,
    ModelDirectory,
    fingerprint,
    unreadable,
)
from arcflow_jax.models.model_directory import DESCRIPTION as MODEL
from arcflow_jax.networks.states import nest, unnest
from arcflow_jax.storage.files import json_records

TOGETHER = 2**28  # bytes of arrays that are read at once
DELETED = 1.0  # seconds in which a checkpoint that a run is deleting is gone


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of what is verified.

    Attributes:
      name: for the line that is printed.
      check: returns what there is to say of it. Raises UserError if it is damaged.
    """

    name: str
    check: Callable[[], str]


def verify(folder: Path) -> int:
    """Checks everything in a folder, and prints a line for each part. Returns the number of parts.

    Raises:
      UserError: if a part is damaged, after all have been checked, or if the folder is none of what is known.
      NetworkError: at once, if the folder is in a bucket that does not answer.
    """
    faults = []
    parts = parts_of(folder)
    with progress_bar() as progress:
        task = progress.add_task("verifying", total=len(parts), text="")
        for part in parts:
            progress.update(task, description=f"verifying {part.name}")
            try:
                print(f"{part.name}: {part.check()}", flush=True)
            except NetworkError:  # which says nothing of the part
                raise
            except UserError as error:
                print(f"{part.name}: DAMAGED", flush=True)
                faults.append(error)
            progress.advance(task)
    if faults:
        raise UserError(f"{len(faults)} of {len(parts)} parts of {folder} are damaged; the first: {faults[0]}")
    return len(parts)


def parts_of(folder: Path) -> list[Part]:
    """The parts of a model, run, export or cache. Raises UserError if the folder is none, or cannot be opened."""
    kinds = {MODEL: parts_of_model, ADAPTER: parts_of_run, EMBEDDINGS: parts_of_cache, CONFIG: parts_of_export}
    for name, parts in kinds.items():
        if (folder / name).is_file():
            return parts(folder)
    raise UserError(f"{folder} is no model, run, export or cache of embeddings: it has none of {', '.join(kinds)}")


def parts_of_model(folder: Path) -> list[Part]:
    """Each component and each tokenizer."""
    model = ModelDirectory.open(folder)

    def tokenizer(name: str) -> str:
        load_tokenizer(model.tokenizer(name))
        return "as it was written" if model.description.tokenizers else "loads; this format has no SHA-256 of it"

    components = [Part(name, lambda name=name: component(model, name)) for name in model.networks]
    return components + [Part(name, lambda name=name: tokenizer(name)) for name in model.family.tokenizers]


def component(model: ModelDirectory, name: str) -> str:
    """Checks a component's arrays. Raises UserError."""
    model.check_files(name)
    entry = model.description.components[name]
    expected = entry.stored or (entry.fingerprint if entry.dtype == entry.source_dtype else None)
    digests, size = [], 0
    for path, array in stored_arrays(model.path / name / CHECKPOINT, model.path / name):
        check_finite(array, f"{model.path / name}: {path}")
        digest = ArrayDigest(path, array.shape, array.dtype)
        digest.update(array)
        digests.append(digest.finish())
        size += array.nbytes
    said = f"{len(digests)} arrays, {size / 1e6:.1f} MB"
    if expected is None:
        return f"{said}; this format has no digest of it"
    if fingerprint(digests) != expected:
        raise UserError(f"{model.path / name} is damaged: its arrays are not those that were written; convert again")
    return said


def stored_arrays(checkpoint: Path, where: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of an Orbax checkpoint, one after the other, by their paths on disk. Raises UserError."""
    try:
        with ocp.Checkpointer(handler()) as checkpointer:
            kept = unnest(handler().metadata(place(checkpoint)).tree).items()
            for group in read_together({path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in kept}):
                item = nest(group)
                restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
                args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
                restored = unnest(checkpointer.restore(place(checkpoint), args=args))
                yield from ((path, np.asarray(restored.pop(path))) for path in group)
    except Exception as error:  # Orbax and TensorStore raise all kinds of errors, down to the bare Exception
        raise unreadable(where, error) from error


def read_together(arrays: dict[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """Groups of at most `TOGETHER` bytes, or of one array: each reading of a bucket waits for several answers."""
    group: dict[str, jax.ShapeDtypeStruct] = {}
    size = 0
    for path, array in arrays.items():
        more = math.prod(array.shape) * array.dtype.itemsize
        if group and size + more > TOGETHER:
            yield group
            group, size = {}, 0
        group[path] = array
        size += more
    if group:
        yield group


def check_finite(array: np.ndarray, what: str) -> None:
    """Raises UserError if a floating-point array has NaN or infinity."""
    if jax.numpy.issubdtype(array.dtype, jax.numpy.floating) and not np.isfinite(array).all():
        raise UserError(f"{what} has values that are not finite")


def parts_of_run(folder: Path) -> list[Part]:
    """Each checkpoint, and the log."""
    _, checkpoints = load_adapter(folder)

    def checkpoint(step: int) -> str:
        try:
            arrays = jax.tree_util.tree_leaves_with_path(checkpoints.everything(step))
        except UserError:
            time.sleep(DELETED)
            if (folder / "checkpoints" / str(step)).exists():
                raise
            return "deleted meanwhile by the run, which is training"
        for path, array in arrays:
            check_finite(np.asarray(array), f"checkpoint {step} in {folder}: {jax.tree_util.keystr(path)}")
        return f"{len(arrays)} arrays"

    def log() -> str:
        return f"{len(list(json_records(folder / 'log.jsonl')))} lines"

    steps = sorted(checkpoints.manager.all_steps())
    parts = [Part(f"checkpoint {step}", lambda step=step: checkpoint(step)) for step in steps]
    return parts + ([Part("log.jsonl", log)] if (folder / "log.jsonl").is_file() else [])


def parts_of_export(folder: Path) -> list[Part]:
    """All tensors of a student in the authors' layout, which has no checksums."""
    _, tensors, _ = read_export(folder)
    return [Part("tensors", lambda: finite_tensors(tensors, folder))]


def finite_tensors(tensors: Mapping[str, Any], folder: Path) -> str:
    """Reads all tensors of a folder. Raises UserError if one cannot be read or is not finite."""
    for name, tensor in tensors.items():
        check_finite(np.asarray(tensor), f"{folder}: {name}")
    return f"{len(tensors)} tensors are finite; this layout has no checksums"


def parts_of_cache(folder: Path) -> list[Part]:
    """Each shard."""
    _, shards, _ = read_cache(folder)

    def shard(index: int) -> str:
        path, arrays = shard_path(folder, index), shards[index]
        count = len(arrays["cut"])
        for row in range(count):
            finite_row(checked_row(arrays, row, path).items(), f"{path}, prompt {row}")
        return f"{count} prompts" + ("" if "checksums" in arrays else "; this format has no checksums")

    return [Part(shard_path(folder, i).name, lambda i=i: shard(i)) for i in range(len(shards))]


def finite_row(arrays: Iterable[tuple[str, np.ndarray]], where: str) -> None:
    """Raises UserError if one of a prompt's arrays is not finite."""
    for name, array in arrays:
        check_finite(array, f"{where}: {name}")
