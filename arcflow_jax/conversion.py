"""Converts a PyTorch pipeline, a diffusers folder of safetensors, to a model directory (see `model_directory.py`).

The folder may be on the hub. Of a component whose layout the authors publish as a single file (flux1-dev.safetensors,
ae.safetensors), such a file may stand in for the weights in the folder, which still says what the network is like.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from arcflow_jax.components import PIPELINES, TOKENIZERS, Network
from arcflow_jax.convert import hub
from arcflow_jax.convert.engine import Fill, Tensor, check, layers, nearest, shapes_of
from arcflow_jax.convert.safetensors_source import read_file, read_folder
from arcflow_jax.convert.writer import Stream, write_checkpoint
from arcflow_jax.errors import UserError
from arcflow_jax.geometry import geometry, read_json
from arcflow_jax.model_directory import CHECKPOINT, DESCRIPTION, FORMAT, VERSION, Digest, fingerprint, nest


@dataclasses.dataclass(frozen=True)
class Component:
    """A component that has been looked at and can be converted.

    Attributes:
      name: e.g. "transformer".
      network: its kind.
      config: its config.json.
      weights: the folder or file that they come from.
      dtype: of the converted weights: by default the source's, the widest if it mixes several.
      fills: each target with its source tensors.
      bytes: size of the converted weights.
    """

    name: str
    network: Network
    config: dict[str, Any]
    weights: Path
    dtype: np.dtype
    fills: list[tuple[Fill, list[Tensor]]]
    bytes: int


def look_at(source: Path, name: str, network: Network, dtype: Any, file: Path | None) -> Component:
    """Checks a component's config, tensor names, shapes and dtypes; reads no weights. Raises UserError."""
    weights = file or source / name
    tensors = read_file(file) if file else read_folder(weights)
    config_file = source / name / "config.json"
    config = read_json(config_file)
    dimensions = geometry(network.geometry, config, str(config_file))
    try:
        abstract = nnx.state(network.abstract(dimensions))
    except (TypeError, ValueError, ArithmeticError) as error:  # null for a number, 3 heads for a width of 10, …
        raise UserError(f"{config_file} does not describe a {network.class_name} that can be built: {error}") from error
    table = nearest(network.tables(dimensions), tensors)
    fills = list(check(table, tensors, shapes_of(abstract), str(weights)))
    used = [tensor for _, group in fills for tensor in group]
    dtype = np.dtype(dtype or jnp.result_type(*{tensor.dtype for tensor in used}))
    size = sum(math.prod(tensor.shape) for tensor in used) * dtype.itemsize
    return Component(name, network, config, weights, dtype, fills, size)


def look_at_index(source: Path) -> str:
    """The pipeline's class name. Raises UserError if it is not one that can be converted."""
    if not (source / "model_index.json").is_file():
        raise UserError(f"{source} is not a diffusers model folder: it has no model_index.json")
    index = read_json(source / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise UserError(f"{source} is a {pipeline}, supported are {', '.join(PIPELINES)}")
    known = {*PIPELINES[pipeline], *TOKENIZERS[pipeline], "scheduler"}
    for name, entry in index.items():
        if not name.startswith("_") and name not in known and entry != [None, None]:
            raise UserError(f"{source}: component {name} ({entry}) is not supported")
    for name, network in PIPELINES[pipeline].items():
        entry = index.get(name)
        if not isinstance(entry, list) or entry[-1:] != [network.class_name]:
            raise UserError(f"{source}: model_index.json has {name} as {entry}, expected {network.class_name}")
    return pipeline


def fetch(repository: str, revision: str | None, files: Mapping[str, Path]) -> Path:
    """The folder of a hub repository, with all that `convert_model` reads from it. Raises UserError."""
    pipeline = look_at_index(hub.fetch(repository, revision, ["model_index.json"]))
    patterns = ["model_index.json", "scheduler/*", *(f"{name}/*" for name in TOKENIZERS[pipeline])]
    for name in PIPELINES[pipeline]:
        patterns += [f"{name}/config.json", *([] if name in files else hub.weights_of(name))]
    return hub.fetch(repository, revision, patterns)


def convert_model(
    source: str | Path,
    out: str | Path,
    dtype: Any = None,
    revision: str | None = None,
    files: Mapping[str, str | Path] | None = None,
) -> Path:
    """Converts the diffusers folder `source` to the model directory `out`.

    Weights pass through one layer at a time, so that memory holds a few layers, whatever the size of model and
    files. `out` appears at the end, complete, or not at all.

    Args:
      source: a folder with model_index.json and the components' folders, or the hub id of one.
      out: a directory that does not exist yet, or is empty.
      dtype: of the converted weights; by default each component keeps its own.
      revision: of a hub id: branch, tag or commit; by default the main branch.
      files: component → the safetensors file that its weights come from, rather than from its folder; it may be in
        the authors' layout. The folder's config.json applies.

    Raises:
      UserError: if the source is incomplete or wrong, or `out` cannot be written.
    """
    folder, out = Path(source), Path(out).absolute()
    files = {name: Path(file) for name, file in (files or {}).items()}
    refuse_used(out)
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"{source} is a folder, and only a model on the hub has a revision")
    elif hub.is_repository(source):
        folder = fetch(str(source), revision, files)
    else:
        raise UserError(f"source folder {source} does not exist, and a hub id is owner/name")
    pipeline = look_at_index(folder)
    if unknown := sorted(files.keys() - PIPELINES[pipeline]):
        raise UserError(f"a {pipeline} has no {', '.join(unknown)}, only {', '.join(PIPELINES[pipeline])}")
    for name in TOKENIZERS[pipeline]:
        if not (folder / name).is_dir():
            raise UserError(f"component folder {folder / name} is missing")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    components = [
        look_at(folder, name, network, dtype, files.get(name)) for name, network in PIPELINES[pipeline].items()
    ]
    needed = sum(component.bytes for component in components)
    with writing_aside(out, needed) as aside, progress_bar() as progress:
        for name in TOKENIZERS[pipeline]:
            shutil.copytree(folder / name, aside / name)
        digests = {component.name: convert_component(component, aside, progress) for component in components}
        description = {
            "format": FORMAT,
            "version": VERSION,
            "pipeline": pipeline,
            "components": {
                component.name: {
                    "class": component.network.class_name,
                    "dtype": component.dtype.name,
                    "config": component.config,
                    "fingerprint": fingerprint(digests[component.name]),
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


def convert_component(component: Component, out: Path, progress: Progress) -> list[tuple[str, bytes]]:
    """Writes one component's checkpoint under `out`, and returns the digests of its arrays."""
    task = progress.add_task(component.name, total=component.bytes)
    digests = []

    def stream(fill: Fill, tensors: list[Tensor]) -> Stream:
        def read() -> Iterator[np.ndarray]:
            digest = Digest(fill.target, fill.shape, component.dtype)
            for layer in layers(fill, tensors, component.dtype, str(component.weights)):
                digest.update(layer)
                yield layer
                progress.advance(task, layer.nbytes)
            digests.append(digest.finish())

        return Stream(fill.shape, component.dtype, fill.stacked, read)

    streams = {fill.target: stream(fill, tensors) for fill, tensors in component.fills}
    write_checkpoint(out / component.name / CHECKPOINT, nest(streams))
    return digests


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
