"""A converted model: one directory with everything that a pipeline needs.

    model.json                  format, pipeline, each component's class, config, dtype, source dtype, fingerprint and
                                the fingerprint of its stored values, scheduler config, the transformer's fingerprint,
                                the size of every file, SHA-256 of each tokenizer file, and of model.json itself
    transformer/, vae/, …       one Orbax checkpoint per component: a nested dict, keyed by the parts of a variable's
                                path (see `names`)
    tokenizer/, tokenizer_2/    copied from the source

A fingerprint is of the values of the source, whatever the dtype of the converted weights. The transformer's fingerprint
identifies the base that an adapter was trained on.

Each chunk of the weights has a checksum, which is verified when it is read (see `writer`). Model directories of format
version 1 have neither these nor any SHA-256. They are still read.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from arcflow_jax import families, schema
from arcflow_jax.arrays.names import in_memory, on_disk
from arcflow_jax.arrays.orbax import clear_cause, handler, place
from arcflow_jax.errors import UserError, cannot_load, cause_of, first_few, one_line, out_of_memory
from arcflow_jax.families import Family, Network
from arcflow_jax.flow.schedule import Scheduler
from arcflow_jax.networks.quantization import Quantization
from arcflow_jax.networks.states import flatten, nest, unflatten, unnest
from arcflow_jax.networks.student import AdapterConfig, ArcModel
from arcflow_jax.schema import SHA256, Precision, Size
from arcflow_jax.storage.files import cannot_read, file_digest, is_inside, read_own
from arcflow_jax.storage.paths import as_path, in_bucket, sizes_below

DESCRIPTION = "model.json"
FORMAT = "arcflow_jax model"
VERSION = 2
# Where a component's folder has its checkpoint
CHECKPOINT = "state"
AT_ONCE = 2 * 10**9  # bytes that are read at a time: enough to keep a disk or a bucket busy
LARGE = 10**8  # bytes of an array


class ArrayDigest:
    """One array's part in a fingerprint: the SHA-256 of its path, shape, dtype and bytes, which may come in parts."""

    def __init__(self, path: str, shape: tuple[int, ...], dtype: np.dtype):
        self.path = on_disk(path)
        self.sha = hashlib.sha256(f"{on_disk(path)} {tuple(shape)} {np.dtype(dtype).name}\n".encode())

    def update(self, part: np.ndarray) -> None:
        """Adds the next rows."""
        self.sha.update(np.asarray(part, order="C").reshape(-1).view(np.uint8))

    def finish(self) -> tuple[str, bytes]:
        """The path and the hash."""
        return self.path, self.sha.digest()


def fingerprint(digests: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 over the digests of all arrays, in any order."""
    return hashlib.sha256(b"".join(part for _, part in sorted(digests))).hexdigest()


@dataclasses.dataclass(frozen=True)
class ComponentDescription:
    """A component's entry in model.json.

    Attributes:
      class_name: its class in diffusers or transformers.
      config: its config.json.
      dtype, source_dtype: of its weights, and of the source's.
      fingerprint: of its weights, as the source has them.
      stored: SHA-256 of its weights as they are stored; None in models of format version 1.
      quantization: which of its kernels are quantized; `dtype` is that of all other weights.
    """

    class_name: str = dataclasses.field(metadata={"key": "class"})
    config: dict[str, Any]
    dtype: Precision | None = None
    source_dtype: Precision | None = None  # None in models of early versions, as is the fingerprint
    fingerprint: SHA256 | None = None
    stored: SHA256 | None = None
    quantization: Quantization | None = None

    def __post_init__(self):
        if self.stored is not None and None in (self.dtype, self.source_dtype, self.fingerprint):
            raise UserError("missing dtype, source_dtype or fingerprint")


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """The content of model.json.

    Attributes:
      pipeline: class of the pipeline in diffusers.
      components: by name.
      scheduler: its scheduler_config.json.
      fingerprint: of the transformer.
      tokenizers: SHA-256 of each tokenizer's files, by their paths; empty in models of format version 1.
      files: the size in bytes of every other file, by its path in the directory.
    """

    pipeline: str
    components: dict[str, ComponentDescription]
    scheduler: dict[str, Any]
    fingerprint: SHA256
    files: dict[str, Size]
    tokenizers: dict[str, SHA256] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in self.files:
            if not is_inside(name):
                raise UserError(f"files has {one_line(name)}, but has to have paths inside the directory")
        transformer = self.components.get("transformer")
        if transformer is not None and transformer.fingerprint not in (None, self.fingerprint):
            raise UserError("fingerprint is not that of components.transformer")


def unreadable(component: Path, error: Exception) -> UserError:
    """The error of a component whose weights cannot be read. Only what is damaged is called so."""
    if cause_of(error) is not None:
        return cannot_load(str(component), clear_cause(error, component))
    return UserError(f"{component} is damaged: {one_line(error.__cause__ or error)}; convert the model again")


def shape(arrays: Mapping[str, Any], path: str) -> tuple[int, ...] | None:
    """The shape of one array; None if there is no such array."""
    return tuple(arrays[path].shape) if path in arrays else None


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """A converted model, to be read; `conversion.py` writes it.

    Attributes:
      path: of the directory.
      description: the content of model.json.
    """

    path: Path
    description: ModelDescription

    @classmethod
    def open(cls, path: str | Path) -> ModelDirectory:
        """Reads model.json, and no weights.

        Raises:
          UserError: if `path` is not a converted model, is of another format version, or its model.json is damaged.
        """
        path = as_path(path)
        if not path.is_dir():
            raise UserError(f"model directory {path} does not exist")
        if (path / "model_index.json").is_file():
            raise UserError(f"{path} is a PyTorch model: run arcflow convert --source {path} --out DIR first")
        if not (path / DESCRIPTION).is_file():
            raise UserError(f"{path} is not a converted model: it has no {DESCRIPTION}; arcflow convert makes one")
        description = read_own(ModelDescription, path / DESCRIPTION, FORMAT, VERSION)
        family = families.of_pipeline(description.pipeline, path)
        if missing := sorted(family.networks.keys() - description.components.keys()):
            raise UserError(f"{path / DESCRIPTION} is damaged: it lacks {', '.join(missing)}")
        for name, network in family.networks.items():
            if (found := description.components[name].class_name) != network.class_name:
                raise UserError(f"{path / DESCRIPTION}: {name} is a {one_line(found)}, not a {network.class_name}")
        return cls(path, description)

    @property
    def fingerprint(self) -> str:
        """Of the transformer."""
        return self.description.fingerprint

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler's config. Raises UserError if a value is outside its range."""
        return schema.parse(Scheduler, self.description.scheduler, f"{self.path / DESCRIPTION}, scheduler")

    @property
    def family(self) -> Family:
        """The model family."""
        return families.of_pipeline(self.description.pipeline, self.path)

    @property
    def networks(self) -> dict[str, Network]:
        """Component → kind of network."""
        return self.family.networks

    def config_json(self, component: str) -> dict[str, Any]:
        """The component's config.json."""
        return self.description.components[component].config

    def config(self, component: str) -> Any:
        """The config dataclass of a component, e.g. a FluxConfig."""
        where = f"{self.path / DESCRIPTION}, {component}"
        return schema.parse(self.networks[component].config, self.config_json(component), where)

    def dtype(self, component: str) -> np.dtype:
        """The dtype in which the component's weights are stored."""
        return jax.numpy.dtype(self.description.components[component].dtype or "float32")

    def abstract(self, component: str, dtype: Any = None) -> nnx.Module:
        """The component's network with shapes in place of arrays, by default in the dtype of its weights."""
        dtype = dtype or self.dtype(component)
        return self.networks[component].abstract(self.config(component), dtype, self.quantization(component))

    def student(self, adapter: AdapterConfig, dtype: Any) -> ArcModel:
        """The transformer with a student's head and LoRA, shapes in place of arrays."""
        adapter = adapter.with_targets(self.family.lora_targets)
        quantization = self.quantization("transformer")
        return self.networks["transformer"].student(self.config("transformer"), adapter, dtype, quantization)

    def quantization(self, component: str) -> Quantization | None:
        """Which of a component's kernels are quantized; None if none are."""
        return self.description.components[component].quantization

    def load(
        self,
        component: str,
        abstract_state: nnx.State,
        shardings: nnx.State | jax.sharding.Sharding | None = None,
        part: str | tuple[str, ...] = "",
    ) -> nnx.State:
        """The weights of a component, read directly to their devices: no host holds all of them.

        Args:
          component: e.g. "transformer".
          abstract_state: of the network, e.g. `nnx.state(directory.abstract(component))`; the weights get its dtypes.
          shardings: one for each variable, as from `mesh.state_shardings`, or one for all; by default the first
            device.
          part: reads one module only, e.g. "decoder", or a few; `abstract_state` has only those then.

        Raises:
          UserError: if the checkpoint is damaged or does not fit the network.
        """
        if shardings is None:
            shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if isinstance(shardings, jax.sharding.Sharding):
            one = shardings
            shardings = jax.tree.map(lambda _: one, abstract_state)
        targets = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract_state, shardings
        )
        wanted = {on_disk(path): variable.get_value() for path, variable in flatten(targets).items()}
        self.check_files(component)
        checkpoint = place(self.path / component / CHECKPOINT)
        try:
            stored = unnest(handler().metadata(checkpoint).tree)
            parts = tuple(f"{each}." for each in ([part] if isinstance(part, str) else part))
            stored = {path: array for path, array in stored.items() if not part or path.startswith(parts)}
            # Checked first, for one error that lists all that differ
            wrong = [in_memory(path) for path in sorted(wanted | stored) if shape(wanted, path) != shape(stored, path)]
            if not wrong:
                targets = nest(wanted)
                restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
                args = ocp.args.PyTreeRestore(targets, restore_args=restore_args, partial_restore=bool(part))
                largest = max(math.prod(x.shape) * x.dtype.itemsize for x in wanted.values())
                with ocp.Checkpointer(handler(at_once=max(largest, AT_ONCE))) as checkpointer:
                    restored = unnest(checkpointer.restore(checkpoint, args=args))
                if largest > LARGE:
                    gc.collect()  # Orbax leaves gigabytes in reference cycles
                return unflatten(abstract_state, {in_memory(path): array for path, array in restored.items()})
        except Exception as error:  # Orbax and TensorStore raise all kinds of errors, down to the bare Exception
            if out_of_memory(error):
                raise
            raise unreadable(self.path / component, error) from error
        raise UserError(f"{self.path / component} does not fit the network: {len(wrong)} differ ({first_few(wrong)})")

    def tokenizer(self, name: str) -> Path:
        """The folder of a tokenizer. Raises UserError if its files are not as they were written."""
        self.check_files(name)
        for file, sha256 in self.description.tokenizers.items():
            with cannot_read(self.path / file):
                as_written = not file.startswith(f"{name}/") or file_digest(self.path / file) == sha256
            if not as_written:
                raise UserError(f"{self.path / file} is damaged, or was changed: convert the model again")
        return self.path / name

    def check_files(self, component: str) -> None:
        """Raises UserError if a file of a component is missing, cannot be read, has another size than when it was
        written, or is not one of those that were written."""
        folder = self.path / component
        with cannot_read(folder):
            sizes = {f"{component}/{name}": size for name, size in sizes_below(folder).items()}
            for name, size in self.description.files.items():
                if name.startswith(f"{component}/") and sizes.get(name) != size:
                    fault = "truncated" if name in sizes else "missing"
                    raise UserError(f"{folder} is damaged: {name} is {fault}; convert the model again")
            others = [] if in_bucket(folder) else [file for file in folder.rglob("*") if not file.is_dir()]
            for name in {*sizes, *(file.relative_to(self.path).as_posix() for file in others)}:
                if name not in self.description.files:
                    raise UserError(f"{folder} is damaged: {Path(name).name} is not a file of it; convert again")
