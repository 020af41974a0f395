"""Files of style LoRAs: found on disk or on the hub, read, and fused into a model that is being converted."""

# r LoRA rank

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcflow_jax import schema
from arcflow_jax.convert.engine import cast
from arcflow_jax.convert.style_lora import Names, PeftConfig, Update, mentioned, read_lora
from arcflow_jax.errors import UserError, first_few
from arcflow_jax.families import Network
from arcflow_jax.networks.layers import linear_layers
from arcflow_jax.schema import Offset
from arcflow_jax.storage import hub
from arcflow_jax.storage.files import parse_json, read_json
from arcflow_jax.storage.paths import as_path
from arcflow_jax.storage.safetensors import read_file, read_metadata

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers and of PEFT
PEFT = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # where diffusers has PEFT's config, in keys that begin with the component


def split_scale(text: str) -> tuple[str, float]:
    """Source and scale of FILE_OR_HUB_ID[:scale]; the scale is 1 by default. Raises UserError if it is not finite."""
    source, colon, end = text.rpartition(":")
    try:
        scale = float(end) if colon else None
    except ValueError:  # the colon is part of the path, as in gs://
        scale = None
    return (text, 1.0) if scale is None else (source, schema.converted(Offset, scale, f"scale of LoRA {source}"))


def read_style_lora(source: str | Path, networks: Mapping[str, tuple[Network, Any]]) -> list[Update]:
    """The updates of a style LoRA; A and B are in host memory.

    Args:
      source: a safetensors file; a folder with one; or a hub id, owner/name or owner/name/file.safetensors.
      networks: component → its kind of network, and its config.

    Raises:
      UserError: if there is none, it is damaged or a pickle, it is another kind of adapter, or it does not fit.
    """
    file = find(source)
    tensors = read_file(file)
    names = {}
    for component in mentioned(tensors) & networks.keys():
        network, config = networks[component]
        kernels = {
            f"{path}.kernel": layer.kernel.shape for path, layer in linear_layers(network.abstract(config)).items()
        }
        names[component] = Names([*network.tables(config), *network.lora_tables], kernels)
    return read_lora(tensors, names, read_configs(file, names), str(file))


def find(source: str | Path) -> Path:
    """The file of a style LoRA, downloaded if it is on the hub. Raises UserError as `read_style_lora`."""
    path = as_path(source)
    if not path.exists():
        named = hub.split_folder(source)
        if named is None:
            raise UserError(f"LoRA {hub.not_found(source)}")
        repository, inside = named
        folder, _, file = inside.rpartition("/") if inside.endswith(".safetensors") else (inside, "", "")
        wanted, config = (
            [f"{folder}/{name}".lstrip("/") for name in names] for names in ([file] if file else FILES, [PEFT])
        )
        path = hub.fetch(repository, None, [*wanted, *config]) / inside
        if not path.exists() or (path.is_dir() and not any((path / file).is_file() for file in FILES)):
            raise UserError(
                f"{source} on the hub holds no {' or '.join(wanted)}: name the file, {repository}/FILE.safetensors"
            )
    if not path.is_dir():
        return path
    found = [path / file for file in FILES if (path / file).is_file()] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        held = f"several files ({first_few([file.name for file in found])})" if found else "no .safetensors file"
        raise UserError(f"LoRA folder {path} holds {held}: name the file")
    return found[0]


def read_configs(file: Path, components: Mapping[str, Any]) -> dict[str, PeftConfig]:
    """PEFT's config of each component that has one. Raises UserError if one is damaged."""
    config = file.parent / PEFT
    if file.name == FILES[1] and config.is_file():
        return {"transformer": schema.parse(PeftConfig, read_json(config), config)}
    where = f"{file}: its metadata {METADATA}"
    values = parse_json(read_metadata(file).get(METADATA, "{}"), where)
    configs = {}
    for component in components:
        begin = f"{component}."
        own = {key.removeprefix(begin): value for key, value in values.items() if key.startswith(begin)}
        if own:
            configs[component] = schema.parse(PeftConfig, own, f"{where}, {component}")
    return configs


def fused_layers(layers: Iterator[np.ndarray], updates: Sequence[Update], where: str) -> Iterator[np.ndarray]:
    """The layers of a kernel, [d_in, d_out] each, with their updates added in float32, in the dtype that they had.

    Raises:
      UserError: that names `where`, if a value becomes infinite.
    """
    for number, layer in enumerate(layers):
        own = [update for update in updates if update.index in (None, number)]
        if own:
            changes = (update.a.astype(np.float32) @ update.b.astype(np.float32) * update.scale for update in own)
            layer = cast(layer.astype(np.float32) + sum(changes), layer.dtype, where)
        yield layer
