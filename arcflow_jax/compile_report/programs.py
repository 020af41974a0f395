"""The programs to compile: jitted functions with the shapes, dtypes and shardings of their arguments."""

# B batch, N image tokens, T text tokens

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import ShapeDtypeStruct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arcflow_jax import families
from arcflow_jax.checkpoints.model_directory import DESCRIPTION, ComponentDescription, ModelDescription, ModelDirectory
from arcflow_jax.errors import UserError
from arcflow_jax.families.latents import token_grid
from arcflow_jax.generate import merges, sample_student
from arcflow_jax.networks.kernel import Format
from arcflow_jax.networks.student import merged_graphdef, merged_state, split_model
from arcflow_jax.parallel.mesh import batched, check_batch, replicated, sharded
from arcflow_jax.storage.files import read_json
from arcflow_jax.training.compile import parts
from arcflow_jax.training.optimizer import make_optimizer
from arcflow_jax.training.plan import chosen_remat, held_in_training, step_settings
from arcflow_jax.training.recipe import Recipe
from arcflow_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Program:
    """What to compile.

    Attributes:
      function: a jitted function.
      arguments, keywords: its arguments, as ShapeDtypeStructs with shardings.
      passes: the least number of times that it reads all its weights.
      then: a program that runs after it.
      beside: what devices hold beside its arguments, as ShapeDtypeStructs with shardings.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    passes: int
    then: Program | None = None
    beside: Any = ()


def open_model(path: str | Path, quantize: Format | None = None) -> ModelDirectory:
    """A converted model, or a diffusers folder, which needs only its config files. Raises UserError.

    Args:
      quantize: of a folder: the format of the transformer's kernels.
    """
    path = Path(path)
    if (path / DESCRIPTION).is_file() or not (path / "model_index.json").is_file():
        if quantize is not None:
            raise UserError(f"{path} is a converted model, whose kernels are as they are: leave --quantize out")
        return ModelDirectory.open(path)
    family = families.of_pipeline(read_json(path / "model_index.json").get("_class_name"), path)
    components = {
        name: ComponentDescription(family.networks[name].class_name, read_json(path / name / "config.json"))
        for name in ("transformer", "vae")
    }
    directory = ModelDirectory(path, ModelDescription(family.pipeline, components, {}, fingerprint="", files={}))
    quantization = directory.networks["transformer"].quantization(directory.config("transformer"), quantize)
    components["transformer"] = dataclasses.replace(components["transformer"], quantization=quantization)
    return directory


def open_for(
    recipe: Recipe, mesh: Mesh, batch: int, quantize: Format | None, micro_batches: int = 1
) -> tuple[ModelDirectory, int]:
    """The recipe's model, and its number of image tokens. Raises UserError if model, size or batch do not fit."""
    directory = open_model(recipe.model, quantize)
    rows, columns = token_grid(*recipe.largest, directory.config("vae").factor)
    check_batch(batch, mesh, directory.config("transformer").num_attention_heads, micro_batches)
    return directory, rows * columns


def sampler(recipe: Recipe, mesh: Mesh, batch: int, quantize: Format | None = None) -> Program:
    """The few-step sampler of a recipe's student, from noise to latents.

    Args:
      quantize: see `open_model`.

    Raises:
      UserError: if model, size or batch do not fit.
    """
    directory, tokens = open_for(recipe, mesh, batch, quantize)
    dtype = jnp.dtype(recipe.dtype)

    graphdef, base, adapter = split_model(directory.student(recipe.adapter, dtype))
    if merges(directory, None):
        state = jax.eval_shape(functools.partial(merged_state, graphdef), base, adapter)
        graphdef = merged_graphdef(graphdef, base, adapter)
    else:
        state = nnx.merge_state(base, jax.tree.map(lambda x: ShapeDtypeStruct(x.shape, dtype), adapter))
    channels = directory.config("transformer").in_channels
    sharding = NamedSharding(mesh, PartitionSpec(*batched(mesh).spec, "sequence"))
    latents = ShapeDtypeStruct((batch, tokens, channels), jnp.float32, sharding=sharding)
    conditioning = directory.family.prompts.abstract_conditioning(directory, mesh, batch, tokens, dtype)
    scalar = ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    steps = recipe.distillation.nfe
    arguments = (graphdef, sharded(mesh, state), latents, conditioning, scalar, scalar)
    return Program(sample_student, arguments, {"steps": steps}, passes=steps)


def training_step(recipe: Recipe, mesh: Mesh, batch: int, quantize: Format | None = None, *, steady: bool) -> Program:
    """One training step of a recipe's distillation; `steady` is the phase after the teacher's share reached zero.

    Args:
      quantize: see `open_model`.

    Raises:
      UserError: if model, size or batch do not fit.
    """
    directory, tokens = open_for(recipe, mesh, batch, quantize, recipe.accumulate)
    dtype = jnp.dtype(recipe.dtype)
    graphdef, base, adapter = split_model(directory.student(recipe.adapter, dtype))
    optimizer = make_optimizer(recipe.optimizer, adapter)
    state = jax.eval_shape(functools.partial(TrainState.create, optimizer=optimizer), adapter)
    conditioning = directory.family.prompts.abstract_conditioning(directory, mesh, batch, tokens, dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    settings = recipe.distillation
    negative = conditioning if settings.teacher_guidance == "cfg" else None
    others = (sharded(mesh, base), conditioning, key, negative)
    recipe = dataclasses.replace(recipe, batch=batch)
    remat = chosen_remat(
        recipe, directory, mesh, tokens, graphdef, base, adapter, held_in_training(base, adapter, optimizer)
    )
    # Per segment: the student forward, its recomputation and its gradient, and the teacher's calls
    passes = recipe.accumulate * settings.nfe * (3 + (1 if steady else settings.states))
    settings = step_settings(recipe, graphdef, mesh, remat) | {"steady": steady}
    first, *second = parts(sharded(mesh, state), others, settings, mesh, recipe.offload_optimizer)
    then = Program(*second[0], passes=1, beside=others) if second else None
    return Program(*first, passes, then)


PROGRAMS: dict[str, Callable[[Recipe, Mesh, int, Format | None], Program]] = {
    "sampler": sampler,
    "train": functools.partial(training_step, steady=False),
    "train-steady": functools.partial(training_step, steady=True),
}
