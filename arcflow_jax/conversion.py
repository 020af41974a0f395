"""Converts a PyTorch pipeline, a diffusers folder of safetensors, to a model directory (see `model_directory.py`)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint.experimental import v1 as ocp
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from arcflow_jax.components import PIPELINES, TOKENIZERS, Network
from arcflow_jax.convert.engine import Fill, Tensor, check, read, shapes_of
from arcflow_jax.convert.safetensors_source import read_folder
from arcflow_jax.errors import UserError
from arcflow_jax.geometry import geometry, read_json
from arcflow_jax.model_directory import DESCRIPTION, FORMAT, VERSION, digest, fingerprint, nest

WRITE_BYTES = 2**28  # arrays are collected up to this size for one write: small ones together, large ones alone


@dataclasses.dataclass(frozen=True)
class Component:
    """A component that has been looked at and can be converted.

    Attributes:
      name: e.g. "transformer".
      network: its kind.
      config: its config.json.
      dtype: of the converted weights: by default the source's, the widest if it mixes several.
      fills: each target with its source tensors.
      bytes: size of the converted weights.
    """

    name: str
    network: Network
    config: dict[str, Any]
    dtype: np.dtype
    fills: list[tuple[Fill, list[Tensor]]]
    bytes: int


def look_at(source: Path, name: str, network: Network, dtype: Any) -> Component:
    """Checks a component's config, tensor names, shapes and dtypes; reads no weights. Raises UserError."""
    tensors = read_folder(source / name)
    file = source / name / "config.json"
    config = read_json(file)
    try:
        abstract = nnx.state(network.abstract(geometry(network.geometry, config, str(file))))
    except (TypeError, ValueError, ArithmeticError) as error:  # null for a number, 3 heads for a width of 10, …
        raise UserError(f"{file} does not describe a {network.class_name} that can be built: {error}") from error
    fills = list(check(network.table, tensors, shapes_of(abstract), str(source / name)))
    used = [tensor for _, group in fills for tensor in group]
    dtype = np.dtype(dtype or jnp.result_type(*{tensor.dtype for tensor in used}))
    return Component(
        name, network, config, dtype, fills, sum(math.prod(tensor.shape) for tensor in used) * dtype.itemsize
    )


def look_at_all(source: Path, dtype: Any) -> tuple[str, list[Component]]:
    """The pipeline's class name, and its components. Raises UserError on what cannot be converted."""
    if not (source / "model_index.json").is_file():
        raise UserError(f"{source} is not a diffusers model folder: it has no model_index.json")
    index = read_json(source / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise UserError(f"{source} is a {pipeline}, supported are {', '.join(PIPELINES)}")
    known = {*PIPELINES[pipeline], *TOKENIZERS, "scheduler"}
    for name, entry in index.items():
        if not name.startswith("_") and name not in known and entry != [None, None]:
            raise UserError(f"{source}: component {name} ({entry}) is not supported")
    for name, network in PIPELINES[pipeline].items():
        entry = index.get(name)
        if not isinstance(entry, list) or entry[-1:] != [network.class_name]:
            raise UserError(f"{source}: model_index.json has {name} as {entry}, expected {network.class_name}")
    for name in TOKENIZERS:
        if not (source / name).is_dir():
            raise UserError(f"component folder {source / name} is missing")
    return pipeline, [look_at(source, name, network, dtype) for name, network in PIPELINES[pipeline].items()]


def convert_model(source: str | Path, out: str | Path, dtype: Any = None) -> Path:
    """Converts the diffusers folder `source` to the model directory `out`.

    Weights pass through one target at a time, so that memory holds about three times the largest stacked
    array: itself, and Orbax's copies of it. `out` appears at the end, complete, or not at all.

    Args:
      source: a folder with model_index.json and the components' folders.
      out: a directory that does not exist yet, or is empty.
      dtype: of the converted weights; by default each component keeps its own.

    Raises:
      UserError: if the source is incomplete or wrong, or `out` cannot be written.
    """
    source, out = Path(source), Path(out).absolute()
    refuse_used(out)
    if not source.is_dir():
        raise UserError(f"source folder {source} does not exist")
    pipeline, components = look_at_all(source, dtype)
    scheduler = read_json(source / "scheduler" / "scheduler_config.json")
    needed = sum(component.bytes for component in components)
    with writing_aside(out, needed) as aside, progress_bar() as progress:
        for name in TOKENIZERS:
            shutil.copytree(source / name, aside / name)
        digests = {component.name: convert_component(component, source, aside, progress) for component in components}
        description = {
            "format": FORMAT,
            "version": VERSION,
            "pipeline": pipeline,
            "components": {
                component.name: {
                    "class": component.network.class_name,
                    "dtype": component.dtype.name,
                    "config": component.config,
                }
                for component in components
            },
            "scheduler": scheduler,
            "fingerprint": fingerprint(digests["transformer"]),
            "files": {
                path.relative_to(aside).as_posix(): path.stat().st_size
                for path in sorted(aside.rglob("*"))
                if path.is_file()
            },
        }
        (aside / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    return out


def refuse_used(out: Path) -> None:
    """Raises UserError unless `out` is a directory that can be made, or is empty."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already: name a directory that does not, or remove it first")
    if file := next((parent for parent in out.parents if parent.is_file()), None):
        raise UserError(f"cannot write {out}: {file} is not a directory")


def progress_bar() -> Progress:
    """A line a component with bytes, speed and time left, on a terminal only."""
    return Progress(
        TextColumn("{task.description:16}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def convert_component(component: Component, source: Path, out: Path, progress: Progress) -> list[tuple[str, bytes]]:
    """Writes one component's checkpoint under `out`, and returns the digests of its arrays."""
    task = progress.add_task(component.name, total=component.bytes)
    digests, waiting = [], {}
    for fill, tensors in component.fills:
        array = read(fill, tensors, component.dtype, str(source / component.name))
        digests.append(digest(fill.target, array))
        waiting[fill.target] = array
        if sum(array.nbytes for array in waiting.values()) >= WRITE_BYTES:
            save(out / component.name, waiting)
            waiting.clear()
        progress.advance(task, array.nbytes)
    if waiting:
        save(out / component.name, waiting)
    ocp.partial.finalize(out / component.name)
    return digests


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Adds arrays, by dotted path, to the checkpoint at `path`."""
    try:
        ocp.partial.save(path, nest(arrays))
    except ValueError as error:  # TensorStore's form of an OSError
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


@contextlib.contextmanager
def writing_aside(out: Path, needed: int) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` at the end, and is removed if anything goes wrong before.

    Its name is always the same, so that what a killed run left is cleared by the next.

    Raises:
      UserError: if there is no room for `needed` bytes, or on any OSError.
    """
    aside = out.with_name(f".{out.name}.incomplete")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists():
            shutil.rmtree(aside)
        free = shutil.disk_usage(out.parent).free
        if free < needed:
            raise UserError(f"cannot write {out}: it takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
        aside.mkdir()
        try:
            yield aside
            os.replace(aside, out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
