"""Import and export of students in the layout of the ArcFlow authors, which diffusers and PEFT read.

    FOLDER/config.json                             class, config of the teacher's backbone, number of modes
    FOLDER/diffusion_pytorch_model.safetensors     head, output norm and LoRA; metadata `policy_config`

A student may be on the hub. The layout has no LoRA alpha (the scale is 1) and does not name the base. The JSON in
`policy_config` is {"type": "ArcFlow"} in the published students. An export adds those sampling settings to it that
differ from the published ones (`POLICY`).

A folder for diffusers (see `diffusers_folder`) is in this layout too, as far as it can hold the student. Its
config.json says more, under `arcflow_jax` (`Record`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from msgspec import Meta

from arcflow_jax import families, schema
from arcflow_jax.checkpoints.training import DESCRIPTION, AdapterDescription, Checkpoints, load_adapter
from arcflow_jax.convert.adapter import AdapterTable
from arcflow_jax.convert.engine import Tensor, export_tensors, import_tensors
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.models.model_directory import ComponentDescription, ModelDirectory
from arcflow_jax.networks.layers import linear_layers
from arcflow_jax.networks.student import AdapterConfig, split_model
from arcflow_jax.schema import NFE, SHA256, Guidance, Modes, Ratio, Shift
from arcflow_jax.storage import hub
from arcflow_jax.storage.atomic import new_output, whole_directory
from arcflow_jax.storage.files import parse_json, read_json, write_json
from arcflow_jax.storage.paths import as_path
from arcflow_jax.storage.safetensors import PICKLES, read_folder, read_header, read_metadata, write_tensors

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings that a student was distilled for: steps (NFE), timestep shift, last segment's ratio, guidance."""

    steps: NFE
    shift: Shift
    final_step_ratio: Ratio
    guidance: Guidance

    def __post_init__(self):
        schema.check(self)

    @classmethod
    def published(cls, transformer: ComponentDescription, where: object) -> Sampling:
        """The settings of the authors' published students of this base.

        Args:
          transformer: the base's entry in its model.json.
          where: where the entry was read, for errors.
        """
        family = families.of_transformer(transformer.class_name, where)
        config = schema.parse(family.networks["transformer"].config, transformer.config, where)
        return cls(steps=2, shift=3.2, final_step_ratio=1.0, guidance=family.published_guidance(config))


@dataclasses.dataclass(frozen=True)
class Record(Sampling):
    """What config.json says of a student in a folder for diffusers, under the key `RECORD`.

    Attributes:
      pipeline: class of the base model's pipeline in diffusers.
      base: fingerprint of the base's transformer.
      curve: the basis, see `AdapterConfig`.
      modes: K.
    """

    pipeline: str
    base: SHA256
    curve: Literal["momentum", "legendre"]
    modes: Modes


RECORD = "arcflow_jax"
# The settings' names in the authors' training configs, which `policy_config` uses
POLICY = {
    "steps": "nfe",
    "shift": "shift",
    "final_step_ratio": "timestep_ratio",
    "guidance": "distilled_guidance_scale",
}


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """The part of config.json that is not the backbone's config."""

    num_gaussians: Annotated[int, Meta(ge=2, le=1024)]  # K

    REQUIRED: ClassVar[dict[str, Any]] = {"logweights_channels": 4}


def import_adapter(
    source: str | Path, base: str | Path, out: str | Path, revision: str | None = None, **sampling: float | None
) -> Path:
    """Imports a student in the authors' layout, and returns `out`.

    The result is a directory as `arcflow train` writes it, with EMA weights only: it can be sampled and exported, but
    not resumed.

    Args:
      source: the student's folder, its safetensors file, or a hub id (see `find`).
      base: the converted model that the student was distilled from. The layout does not name it: only the config is
        checked, and the result gets this model's fingerprint.
      out: a directory that does not exist yet, or is empty. It appears complete, or not at all.
      revision: of a hub id: branch, tag or commit; by default the main branch.
      sampling: fields of `Sampling` that override the file's settings; None keeps them.

    Raises:
      UserError: if the source is incomplete or wrong, does not fit the base, or `out` cannot be written.
    """
    out = as_path(out).absolute()
    with new_output(out, DESCRIPTION):
        directory = ModelDirectory.open(base)
        description, adapter = read_student(find(source, revision), directory, **sampling)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter))
        with whole_directory(out, needed) as aside:
            with Checkpoints(aside) as checkpoints:
                checkpoints.save_ema(adapter)
            description.write(aside)
    return out


def open_student(
    source: str | Path, directory: ModelDirectory
) -> tuple[AdapterDescription, Callable[[nnx.State, bool], nnx.State]]:
    """A student to sample from: a training run, or one in the authors' layout; on disk or on the hub (see `find`).

    Returns:
      Its description, and a function that reads its weights. The function takes an abstract adapter, whose shardings
      it follows, and whether to read the weights after the last training step instead of the EMA weights.

    Raises:
      UserError: if there is no student, it is incomplete or wrong, or it is of another base.
    """
    found = find(source)
    if found.is_file() or ((found / CONFIG).is_file() and not (found / DESCRIPTION).is_file()):
        description, adapter = read_student(found, directory)

        def place(abstract: nnx.State, raw: bool) -> nnx.State:
            if raw:
                raise UserError(f"{source} holds EMA weights only: leave --raw out")
            return jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), adapter, abstract)

        return description, place
    description, checkpoints = load_adapter(found, directory.fingerprint)

    def restore(abstract: nnx.State, raw: bool) -> nnx.State:
        with checkpoints:
            return checkpoints.restore_adapter(abstract, raw)

    return description, restore


def find(source: str | Path, revision: str | None = None) -> Path:
    """The folder or file of a student, downloaded if it is on the hub.

    Args:
      source: a path, or a hub id: owner/name, or owner/name/folder for a folder in that repository. What could be a
        local path is not looked up on the hub (see `hub.split_folder`).
      revision: of a hub id: branch, tag or commit; by default the main branch.

    Raises:
      UserError: if there is none, or the download fails.
    """
    path = as_path(source)
    if path.exists():
        if revision is not None:
            raise UserError(f"{source} is not on the hub, and only a student there has a revision")
        return path
    named = hub.split_folder(source)
    if named is None:
        raise UserError(f"adapter {hub.not_found(source)}")
    repository, folder = named
    files = [f"{folder}/{file}".lstrip("/") for file in (CONFIG, DESCRIPTION, "checkpoints/*")]
    try:
        found = hub.fetch(repository, revision, [*files, *hub.weights_of(folder)]) / folder
    except UserError as error:
        raise type(error)(f"adapter {source} does not exist on this machine, and on the hub: {error}") from error
    if not found.is_dir():
        raise UserError(f"{source} on the hub holds no student")
    return found


def read_student(
    source: Path, directory: ModelDirectory, **sampling: float | None
) -> tuple[AdapterDescription, nnx.State]:
    """Description and weights, float32 arrays, of a student in the authors' layout, or of a folder for diffusers.

    Raises as `import_adapter`.
    """
    config, tensors, policy = read_export(source)
    check_config(config, directory, source)
    transformer = directory.description.components["transformer"]
    if RECORD in config:
        settings = schema.parse(Record, config[RECORD], f"{source}, {CONFIG}: {RECORD}", own=True)
        base, basis, modes = settings.base, settings.curve, settings.modes
    else:
        modes = schema.parse(HeadConfig, config, f"{source}, {CONFIG}").num_gaussians
        settings = dataclasses.replace(Sampling.published(transformer, directory.path), **read_policy(policy, source))
        base, basis = directory.fingerprint, "momentum"
    settings = dataclasses.replace(settings, **{name: value for name, value in sampling.items() if value is not None})

    table = AdapterTable(directory.networks["transformer"].table)
    rank, targets = table.lora(tensors, linear_layers(directory.abstract("transformer").backbone))
    if not rank and RECORD not in config:
        raise UserError(
            f"{source} holds no LoRA: it has no tensor *.lora_A.weight of a layer that {directory.path} has"
        )
    rank = rank or AdapterConfig.rank  # without LoRA, of nothing
    description = AdapterDescription(
        base=base,
        adapter=AdapterConfig(modes, rank, alpha=float(rank), dropout=0.0, targets=targets, basis=basis),
        distillation=Distillation(nfe=settings.steps, shift=settings.shift, final_step_ratio=settings.final_step_ratio),
        guidance=settings.guidance,
        transformer=transformer,
        pipeline=directory.family.pipeline,
    )
    description.check_base(directory.fingerprint, source)
    _, _, abstract = split_model(directory.student(description.adapter, jnp.float32))
    return description, import_tensors(table, tensors, abstract, np.float32, str(source))


def export_adapter(run: str | Path, out: str | Path, *, raw: bool = False, dtype: Any = np.float16) -> Path:
    """Exports a student in the authors' layout, for their PyTorch loader, diffusers and PEFT. Returns `out`.

    The layout has no LoRA alpha, so the scale alpha / rank is multiplied into LoRA B.

    Args:
      run: a directory that `arcflow train` or `import_adapter` wrote.
      out: a directory that does not exist yet, or is empty. It appears complete, or not at all.
      raw: exports the weights after the last training step instead of the EMA weights.
      dtype: of the tensors: float16 as in the authors' exports, bfloat16 or float32.

    Raises:
      UserError: if the layout cannot hold the student in `run` (see `misfit`), a value does not fit in
        `dtype`, or `out` cannot be written.
    """
    run, out = as_path(run), as_path(out).absolute()
    with new_output(out, WEIGHTS):
        if reason := misfit(AdapterDescription.read(run)):
            raise UserError(f"{run} holds {reason}; --format diffusers has room for it")
        description, config, tensors = exported(run, raw, jnp.dtype(dtype))
        policy = policy_of(description, run)
        with whole_directory(out, sum(tensor.nbytes for tensor in tensors.values())) as aside:
            write_json(aside / CONFIG, dict(sorted(config.items())))
            write_tensors(aside / WEIGHTS, tensors, metadata={"policy_config": json.dumps(policy)})
    return out


def exported(run: Path, raw: bool, dtype: np.dtype) -> tuple[AdapterDescription, dict[str, Any], dict[str, np.ndarray]]:
    """Description, config and tensors of a student's export. Raises UserError as `export_adapter`, or `run` is no run.

    The config of a student that the authors' layout cannot hold is of a class that their loader does not know.
    """
    description, checkpoints = load_adapter(run)
    if description.transformer is None:
        raise UserError(
            f"{run / DESCRIPTION} lacks its base's config, which an early version did not write: resume the run with "
            "arcflow train, which adds it"
        )
    adapter = description.adapter
    network = families.of_transformer(description.transformer.class_name, run / DESCRIPTION).networks["transformer"]
    backbone = schema.parse(network.config, description.transformer.config, run / DESCRIPTION)
    _, _, abstract = split_model(network.student(backbone, adapter, jnp.float32))
    with checkpoints:
        state = checkpoints.restore_adapter(abstract, raw)

    tensors = {}
    for name, array in export_tensors(AdapterTable(network.table), state).items():
        if name.endswith("lora_B.weight") and adapter.alpha != adapter.rank:
            array = array * np.float32(adapter.alpha / adapter.rank)
        tensors[name] = cast(array, dtype, f"{run}: {name}")
    config = {"_class_name": f"ArcFlow{network.class_name}", **dataclasses.asdict(backbone)}
    if misfit(description) is None:
        config |= {"_class_name": f"Arc{network.class_name}", **HeadConfig.REQUIRED, "num_gaussians": adapter.modes}
    return description, config, tensors


def read_export(source: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Config, tensors (still on disk) and policy of a student's folder or safetensors file. Raises UserError."""
    if source.is_file() and source.suffix in PICKLES:
        raise UserError(f"{source} is a pickle: unpickling runs any code that it contains; only safetensors are read")
    folder, file = (source, source / WEIGHTS) if source.is_dir() else (source.parent, source)
    tensors = read_folder(folder) if source.is_dir() else read_header(file)
    policy = {"type": "ArcFlow"}
    if file.is_file():
        text = read_metadata(file).get("policy_config", json.dumps(policy))
        policy = parse_json(text, f"{file}: its metadata policy_config")
    if policy.get("type") != "ArcFlow":
        raise UserError(f"{file}: its metadata policy_config is {schema.shown(policy)}, which is not of type ArcFlow")
    return read_json(folder / CONFIG), tensors, policy


def check_config(config: dict[str, Any], directory: ModelDirectory, source: Path) -> None:
    """Raises UserError if config.json describes a student of another network than the base."""
    network = directory.networks["transformer"]
    class_name = f"Arc{network.class_name}"
    if (found := config.get("_class_name")) not in (class_name, f"ArcFlow{network.class_name}"):
        raise UserError(f"{source} is of class {one_line(found)}, a student of this base is of {class_name}")
    theirs = dataclasses.asdict(schema.parse(network.config, config, f"{source}, {CONFIG}"))
    ours = dataclasses.asdict(directory.config("transformer"))
    if different := [f"{name} {theirs[name]} instead of {ours[name]}" for name in ours if theirs[name] != ours[name]]:
        raise UserError(f"{source} was trained on another base than {directory.path}: it has {', '.join(different)}")


def misfit(description: AdapterDescription) -> str | None:
    """Why the authors' layout, momentum with two or more modes and LoRA, cannot hold a student; None if it can."""
    if not description.adapter.targets:
        return "a student without LoRA, which the authors' loader ignores"
    if description.adapter.basis != "momentum":
        return f"a student of basis {description.adapter.basis}: the authors' layout has only momentum"
    if description.adapter.modes == 1:
        return "a linear student (one mode): the authors' layout needs two or more"
    return None


def read_policy(policy: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The fields of `Sampling` that a policy_config sets. Raises UserError if one is no such number."""
    hints = schema.types_of(Sampling)
    return {
        ours: schema.converted(hints[ours], policy[theirs], f"{source}: policy_config.{theirs}")
        for ours, theirs in POLICY.items()
        if theirs in policy
    }


def policy_of(description: AdapterDescription, run: Path) -> dict[str, Any]:
    """The policy_config of a student, the inverse of `read_policy`."""
    settings = description.distillation
    sampling = Sampling(settings.nfe, settings.shift, settings.final_step_ratio, description.guidance)
    published = dataclasses.asdict(Sampling.published(description.transformer, run))
    given = {POLICY[name]: value for name, value in dataclasses.asdict(sampling).items() if value != published[name]}
    return given | {"type": "ArcFlow"}


def cast(array: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """`array` in `dtype`. Raises UserError that names `where` if it holds NaN, or a value becomes infinite."""
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if not np.isfinite(result).all():
        largest = float(np.abs(array).max())
        if math.isfinite(largest):
            raise UserError(f"{where} holds {largest:.3g}, too large for {dtype}: try --dtype bfloat16")
        raise UserError(f"{where} holds NaN or infinite values: the training diverged")
    return result
