"""Converts a PyTorch pipeline, a diffusers folder of safetensors, to a model directory (see `model_directory.py`).

The folder may be on the hub. The weights of a component may come from a single file instead, also in the layout of the
model's authors (flux1-dev.safetensors, ae.safetensors). The component's config.json still comes from the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import Progress

from arcflow_jax import families, schema
from arcflow_jax.arrays.names import on_disk
from arcflow_jax.arrays.writer import Stream, write_checkpoint
from arcflow_jax.console import progress_bar
from arcflow_jax.convert.engine import Fill, Tensor, cast, check, layers, nearest
from arcflow_jax.convert.style_lora import Update
from arcflow_jax.data.tokenizers import FILES, copy_tokenizer
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.families import Family, Network
from arcflow_jax.flow.schedule import Scheduler
from arcflow_jax.models.kernels import Formats, digested, formats_of, quantized_streams
from arcflow_jax.models.model_directory import (
    CHECKPOINT,
    DESCRIPTION,
    FORMAT,
    VERSION,
    ComponentDescription,
    ModelDescription,
    fingerprint,
)
from arcflow_jax.models.style_loras import fused_layers, read_style_lora
from arcflow_jax.networks.kernel import Format
from arcflow_jax.networks.quantization import Quantization
from arcflow_jax.networks.states import nest, shapes_of
from arcflow_jax.schema import Layers, Precision
from arcflow_jax.storage import hub
from arcflow_jax.storage.atomic import new_output, whole_directory
from arcflow_jax.storage.files import file_digest, read_json, write_own
from arcflow_jax.storage.paths import as_path, sizes_below
from arcflow_jax.storage.safetensors import read_file, read_folder

FAR = 10  # a config that describes a network so many times larger than its weights is refused at once


@dataclasses.dataclass(frozen=True)
class Component:
    """A component that has been inspected and can be converted.

    Attributes:
      name: e.g. "transformer".
      network: its kind of network.
      config: its config.json.
      weights: the folder or file that they come from.
      source_dtype: of the source's weights; if the source mixes several, one that holds all of them exactly.
      dtype: of the converted weights.
      quantization: which kernels are quantized.
      fills: each target array with its source tensors.
      updates: those of style LoRAs, which are added to its kernels.
    """

    name: str
    network: Network
    config: dict[str, Any]
    weights: Path
    source_dtype: np.dtype
    dtype: np.dtype
    quantization: Quantization | None
    fills: list[tuple[Fill, list[Tensor]]]
    updates: list[Update] = dataclasses.field(default_factory=list)


def inspect_component(
    source: Path, name: str, network: Network, dtype: Any, format: Format | None, file: Path | None
) -> Component:
    """Checks a component's config, tensor names, shapes and dtypes, and reads no weights. Raises UserError."""
    weights = file or source / name
    tensors = read_file(file) if file else read_folder(weights)
    config_file = source / name / "config.json"
    config = read_json(config_file)
    dimensions = schema.parse(network.config, config, config_file)
    for field, hint in schema.types_of(network.config).items():
        if hint is Layers and getattr(dimensions, field) > len(tensors):
            raise UserError(
                f"{config_file}: {field} is {getattr(dimensions, field)}, but {weights} has only {len(tensors)} tensors"
            )
    try:
        abstract = nnx.state(network.abstract(dimensions))
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:  # null for a number, 3 heads for a width of 10, …
        raise UserError(f"{config_file} does not describe a {network.class_name} that can be built: {error}") from error
    shapes = shapes_of(abstract)
    ours, theirs = sum(map(math.prod, shapes.values())), sum(math.prod(tensor.shape) for tensor in tensors.values())
    if ours > FAR * theirs:  # comparing shapes takes memory and time in proportion to them
        raise UserError(f"{config_file} describes a network of {ours:,} numbers, but {weights} has {theirs:,}")
    fills = list(check(nearest(network.tables(dimensions), tensors), tensors, shapes, str(weights)))
    used = [tensor for _, group in fills for tensor in group]
    source_dtype = np.dtype(jnp.result_type(*{tensor.dtype for tensor in used}))
    dtype = np.dtype(dtype or source_dtype)
    quantization = network.quantization(dimensions, format)
    return Component(name, network, config, weights, source_dtype, dtype, quantization, fills)


def read_index(source: Path) -> Family:
    """The model's family, from its model_index.json. Raises UserError if the model cannot be converted."""
    if not (source / "model_index.json").is_file():
        raise UserError(f"{source} is not a diffusers model folder: it has no model_index.json")
    index = read_json(source / "model_index.json")
    family = families.of_pipeline(index.get("_class_name"), source)
    known = {*family.networks, *family.tokenizers, "scheduler"}
    for name, value in family.settings.items():
        if (found := index.get(name, value)) != value or type(found) is not type(value):
            raise UserError(f"{source}: {name} is {schema.shown(found)} in model_index.json, only {value} is supported")
    known |= family.settings.keys()
    for name, entry in index.items():
        if not name.startswith("_") and name not in known and entry != [None, None]:
            raise UserError(f"{source}: component {one_line(name)} ({schema.shown(entry)}) is not supported")
    for name, network in family.networks.items():
        entry = index.get(name)
        if not isinstance(entry, list) or entry[-1:] != [network.class_name]:
            raise UserError(
                f"{source}: model_index.json has {name} as {schema.shown(entry)}, expected {network.class_name}"
            )
    return family


def fetch_model(repository: str, revision: str | None, files: Mapping[str, Path]) -> Path:
    """Downloads the files of a hub repository that `convert_model` reads, and returns the folder. Raises UserError."""
    family = read_index(hub.fetch(repository, revision, ["model_index.json"]))
    patterns = ["model_index.json", "scheduler/*", *(f"{name}/{file}" for name in family.tokenizers for file in FILES)]
    for name in family.networks:
        patterns += [f"{name}/config.json", *([] if name in files else hub.weights_of(name))]
    return hub.fetch(repository, revision, patterns)


def convert_model(
    source: str | Path,
    out: str | Path,
    dtype: Any = None,
    revision: str | None = None,
    files: Mapping[str, str | Path] | None = None,
    quantize: Formats | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
) -> Path:
    """Converts the diffusers folder `source` to the model directory `out`, and returns `out`.

    Weights are converted one layer at a time, so memory holds a few layers whatever the size of the model. `out`
    appears complete, or not at all.

    Args:
      source: a folder with model_index.json and the components' folders, or a hub id (see `hub.split_folder`).
      out: a directory that does not exist yet, or is empty.
      dtype: of the converted weights; by default each component keeps its own.
      revision: of a hub id: branch, tag or commit; by default the main branch.
      files: component → a safetensors file to take its weights from, instead of from its folder. The file may be in
        the layout of the model's authors. The config.json in the folder applies.
      quantize: "int8", "fp8" or "int4": the format of the kernels of the transformer and the text encoders (see
        `networks.kernel`); or component → format. By default none are quantized.
      loras: style LoRAs and their strengths, which are added to the weights (see `style_loras.read_style_lora`). The
        result has another fingerprint: it is another base.

    Raises:
      UserError: if the source is incomplete or wrong, or `out` cannot be written.
    """
    folder, out = as_path(source), as_path(out).absolute()
    if dtype is not None:
        dtype = schema.converted(Precision, dtype if isinstance(dtype, str) else np.dtype(dtype).name, "dtype")
    files = {name: as_path(file) for name, file in (files or {}).items()}
    with new_output(out, DESCRIPTION):
        if folder.is_dir():
            if revision is not None:
                raise UserError(f"{source} is a folder, and only a model on the hub has a revision")
        elif hub.is_repository(source):
            folder = fetch_model(str(source), revision, files)
        else:
            raise UserError(f"source folder {hub.not_found(source)}")
        convert_folder(folder, out, dtype, files, quantize, loras)
    return out


def convert_folder(
    folder: Path,
    out: Path,
    dtype: Any,
    files: Mapping[str, Path],
    quantize: Formats | None,
    loras: Sequence[tuple[str | Path, float]],
) -> None:
    """Does what `convert_model` says for a local folder, while this process is the only writer of `out`."""
    family = read_index(folder)
    if unknown := sorted(files.keys() - family.networks):
        raise UserError(f"a {family.pipeline} has no {', '.join(unknown)}, only {', '.join(family.networks)}")
    for name in family.tokenizers:
        if not (folder / name).is_dir():
            raise UserError(f"component folder {folder / name} is missing")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    schema.parse(Scheduler, scheduler, folder / "scheduler" / "scheduler_config.json")
    formats = formats_of(family, quantize)
    components = [
        inspect_component(folder, name, network, dtype, formats.get(name), files.get(name))
        for name, network in family.networks.items()
    ]
    configs = {
        each.name: (each.network, schema.parse(each.network.config, each.config, each.name)) for each in components
    }
    for lora, weight in loras:
        for update in read_style_lora(lora, configs):
            component = next(each for each in components if each.name == update.component)
            component.updates.append(update._replace(scale=update.scale * weight))
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(progress_bar(of_bytes=True))
        writers = [ComponentWriter(component, progress) for component in components]
        aside = stack.enter_context(whole_directory(out, sum(writer.bytes for writer in writers)))
        for name in family.tokenizers:
            copy_tokenizer(folder / name, aside / name, folder)
        copied = [file for name in family.tokenizers for file in sorted((aside / name).iterdir())]
        tokenizers = {file.relative_to(aside).as_posix(): file_digest(file) for file in copied}
        entries = {writer.component.name: writer.write(aside) for writer in writers}
        description = ModelDescription(
            pipeline=family.pipeline,
            components=entries,
            scheduler=scheduler,
            fingerprint=entries["transformer"].fingerprint,
            tokenizers=tokenizers,
            files=sizes_below(aside),
        )
        write_own(aside / DESCRIPTION, description, FORMAT, VERSION)


class ComponentWriter:
    """Writes a component's checkpoint.

    Attributes:
      component: what is written.
      streams: the arrays to be written, by their paths on disk.
    """

    def __init__(self, component: Component, progress: Progress):
        self.component, self.progress = component, progress
        total = sum(math.prod(fill.shape) for fill, _ in component.fills)
        self.task = progress.add_task(component.name, total=total * component.source_dtype.itemsize, text="")
        self.digests: list[tuple[str, bytes]] = []  # of the source's values, in the source's dtype
        self.stored: list[tuple[str, bytes]] = []  # of the values as they are stored
        streams = [self.streams_of(fill, tensors) for fill, tensors in component.fills]
        self.streams = {path: stream for each in streams for path, stream in each.items()}

    def streams_of(self, fill: Fill, tensors: list[Tensor]) -> dict[str, Stream]:
        """The streams of one target."""
        component = self.component
        format = component.quantization and component.quantization.of_kernel(fill.target)
        dtype = component.source_dtype if format else component.dtype

        def read() -> Iterator[np.ndarray]:
            found = layers(fill, tensors, component.source_dtype, str(component.weights))
            updates = [each for each in component.updates if f"{each.layer}.kernel" == fill.target]
            found = fused_layers(found, updates, f"{component.weights}: {fill.target} with its LoRA")
            found = digested(fill.target, fill.shape, component.source_dtype, found, self.digests)
            for name, layer in zip(fill.names, found, strict=True):
                yield cast(layer, dtype, f"{component.weights}: {name}")
                self.progress.advance(self.task, layer.nbytes)

        def stored() -> Iterator[np.ndarray]:
            if dtype != component.source_dtype:
                yield from digested(fill.target, fill.shape, dtype, read(), self.stored)
                return
            yield from read()
            self.stored.append(self.digests[-1])  # one hash suffices

        if format:
            return quantized_streams(fill.target, fill.shape, format, read, self.stored)
        return {on_disk(fill.target): Stream(fill.shape, dtype, fill.stacked, stored)}

    @property
    def bytes(self) -> int:
        """Size of what is written."""
        return sum(stream.bytes for stream in self.streams.values())

    def write(self, out: Path) -> ComponentDescription:
        """Writes the checkpoint under `out`, and returns the component's entry in model.json."""
        component = self.component
        write_checkpoint(out / component.name / CHECKPOINT, nest(self.streams))
        return ComponentDescription(
            class_name=component.network.class_name,
            config=component.config,
            dtype=component.dtype.name,
            source_dtype=component.source_dtype.name,
            fingerprint=fingerprint(self.digests),
            stored=fingerprint(self.stored),
            quantization=component.quantization,
        )
