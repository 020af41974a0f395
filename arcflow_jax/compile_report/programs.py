"""The programs to compile: a jitted function and the shapes, dtypes and shardings of its arguments."""

# B batch, N image tokens, T text tokens

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arcflow_jax import arc_model
from arcflow_jax.components import PIPELINES
from arcflow_jax.config import Recipe
from arcflow_jax.errors import UserError
from arcflow_jax.geometry import read_json
from arcflow_jax.latents import token_grid
from arcflow_jax.model_directory import DESCRIPTION, ModelDirectory
from arcflow_jax.models.flux import FluxConditioning, FluxConfig
from arcflow_jax.models.qwen_image import QwenImageConditioning, QwenImageConfig
from arcflow_jax.optim import make_optimizer
from arcflow_jax.pipeline import sample
from arcflow_jax.prompts import QwenPrompts
from arcflow_jax.sharding import batched, replicated, sharded
from arcflow_jax.train import jitted_step
from arcflow_jax.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Program:
    """What to compile.

    Attributes:
      function: jitted.
      arguments: ShapeDtypeStructs with shardings, as positional and keyword arguments.
      passes: how often it reads all its weights, at the least.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    passes: int


def open_model(path: str | Path) -> ModelDirectory:
    """A converted model, or a diffusers folder, of which only the config files need be there. Raises UserError."""
    path = Path(path)
    if (path / DESCRIPTION).is_file() or not (path / "model_index.json").is_file():
        return ModelDirectory.open(path)
    pipeline = read_json(path / "model_index.json").get("_class_name")
    if pipeline not in PIPELINES:
        raise UserError(f"{path} is a {pipeline}, known are {', '.join(PIPELINES)}")
    components = {name: {"config": read_json(path / name / "config.json")} for name in ("transformer", "vae")}
    return ModelDirectory(path, {"pipeline": pipeline, "components": components})


def flux_conditioning(directory: ModelDirectory, mesh: Mesh, batch: int, tokens: int, dtype: Any) -> FluxConditioning:
    """Shapes of what FLUX.1 is conditioned on."""
    split = batched(mesh)
    config: FluxConfig = directory.geometry("transformer")
    tokenizer = directory.path / "tokenizer_2" / "tokenizer_config.json"
    text = int(min(read_json(tokenizer).get("model_max_length", 512), 512))
    return FluxConditioning(
        text=ShapeDtypeStruct((batch, text, config.joint_attention_dim), dtype, sharding=split),
        pooled=ShapeDtypeStruct((batch, config.pooled_projection_dim), dtype, sharding=split),
        guidance=ShapeDtypeStruct((batch,), jnp.float32, sharding=split) if config.guidance_embeds else None,
        positions=ShapeDtypeStruct((tokens, 3), jnp.float32, sharding=replicated(mesh)),
    )


def qwen_image_conditioning(
    directory: ModelDirectory, mesh: Mesh, batch: int, tokens: int, dtype: Any
) -> QwenImageConditioning:
    """Shapes of what Qwen-Image is conditioned on."""
    split = batched(mesh)
    config: QwenImageConfig = directory.geometry("transformer")
    tokenizer = directory.path / "tokenizer" / "tokenizer_config.json"
    room = int(read_json(tokenizer).get("model_max_length", QwenPrompts.BEFORE + QwenPrompts.TOKENS))
    text = min(room - QwenPrompts.BEFORE, QwenPrompts.TOKENS)
    return QwenImageConditioning(
        text=ShapeDtypeStruct((batch, text, config.joint_attention_dim), dtype, sharding=split),
        lengths=ShapeDtypeStruct((batch,), jnp.int32, sharding=split),
        positions=ShapeDtypeStruct((tokens, 3), jnp.float32, sharding=replicated(mesh)),
    )


# By the pipeline class that model_index.json names
CONDITIONING = {"FluxPipeline": flux_conditioning, "QwenImagePipeline": qwen_image_conditioning}


def open_for(recipe: Recipe, mesh: Mesh, batch: int) -> tuple[ModelDirectory, int]:
    """The recipe's model and the number of its image tokens. Raises UserError if model, size or batch do not fit."""
    directory = open_model(recipe.model)
    rows, columns = token_grid(*recipe.largest, directory.geometry("vae").factor)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % shards:
        raise UserError(f"batch {batch} does not divide by data × fsdp = {shards} of the mesh")
    return directory, rows * columns


def sampler(recipe: Recipe, mesh: Mesh, batch: int) -> Program:
    """The few-step sampler of a recipe's student, its LoRA merged, from noise to latents.

    Raises:
      UserError: if model, size or batch do not fit.
    """
    directory, tokens = open_for(recipe, mesh, batch)
    dtype = jnp.dtype(recipe.dtype)

    graphdef, base, adapter = arc_model.split(directory.student(recipe.adapter, dtype))
    merged = jax.eval_shape(functools.partial(arc_model.merge_student, graphdef), base, adapter)
    channels = directory.geometry("transformer").in_channels
    split = NamedSharding(mesh, PartitionSpec(*batched(mesh).spec, "sequence"))
    latents = ShapeDtypeStruct((batch, tokens, channels), jnp.float32, sharding=split)
    conditioning = CONDITIONING[directory.description["pipeline"]](directory, mesh, batch, tokens, dtype)
    scalar = ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    steps = recipe.distillation.nfe
    arguments = (
        arc_model.merged_graphdef(graphdef, base, adapter),
        sharded(mesh, merged),
        latents,
        conditioning,
        scalar,
        scalar,
    )
    return Program(sample, arguments, {"steps": steps}, passes=steps)


def train_step(recipe: Recipe, mesh: Mesh, batch: int, *, steady: bool) -> Program:
    """One iteration of a recipe's distillation; `steady` once the teacher's share has reached zero.

    Raises:
      UserError: if model, size or batch do not fit.
    """
    directory, tokens = open_for(recipe, mesh, batch)
    dtype = jnp.dtype(recipe.dtype)
    graphdef, base, adapter = arc_model.split(directory.student(recipe.adapter, dtype))
    optimizer = make_optimizer(recipe.optimizer, adapter)
    state = jax.eval_shape(functools.partial(TrainState.create, optimizer=optimizer), adapter)
    conditioning = CONDITIONING[directory.description["pipeline"]](directory, mesh, batch, tokens, dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    settings = recipe.distillation
    negative = conditioning if settings.teacher_guidance == "cfg" else None
    arguments = (sharded(mesh, state), sharded(mesh, base), conditioning, key, negative)
    function = jitted_step(recipe, graphdef, optimizer, mesh, steady=steady)
    # A student forward, again in the backward pass, and the gradient; the teacher
    passes = settings.nfe * (3 + (1 if steady else settings.states))
    return Program(function, arguments, {}, passes)


PROGRAMS: dict[str, Callable[[Recipe, Mesh, int], Program]] = {
    "sampler": sampler,
    "train": functools.partial(train_step, steady=False),
    "train-steady": functools.partial(train_step, steady=True),
}
