"""The programs to compile: jitted functions with the shapes, dtypes and shardings of their arguments."""

# B batch, N image tokens, T text tokens

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import ShapeDtypeStruct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arcflow_jax import families
from arcflow_jax.compile_report.topology import HostSharding
from arcflow_jax.data.tokenizers import max_length
from arcflow_jax.errors import UserError
from arcflow_jax.families.latents import token_grid
from arcflow_jax.families.text import apply_encoder
from arcflow_jax.generate import decode_latents, merges, sample_student
from arcflow_jax.models.kernels import formats_of
from arcflow_jax.models.model_directory import DESCRIPTION, ComponentDescription, ModelDescription, ModelDirectory
from arcflow_jax.networks.kernel import Format
from arcflow_jax.networks.student import merged_graphdef, merged_state, split_model
from arcflow_jax.parallel.mesh import batched, check_batch, replicated, sharded, with_shardings
from arcflow_jax.parallel.offload import block_shardings
from arcflow_jax.storage.files import read_json
from arcflow_jax.storage.paths import as_path
from arcflow_jax.training.compile import parts
from arcflow_jax.training.optimizer import make_optimizer
from arcflow_jax.training.plan import chosen_remat, held_in_training, parameters, step_settings
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


@dataclasses.dataclass(frozen=True)
class WeightOptions:
    """How the weights of a network are held.

    Attributes:
      quantize: format of the kernels, of a model that is not converted; None for the recipe's dtype.
      offload: "blocks" if its blocks wait in host memory.
    """

    quantize: Format | None = None
    offload: Literal["blocks"] | None = None

    def place(self, mesh: Mesh, state: nnx.State) -> nnx.State:
        """A state as shapes with shardings."""
        if self.offload is None:
            return sharded(mesh, state)
        shardings = block_shardings(mesh, state, lambda sharding: HostSharding(sharding.mesh, sharding.spec))
        return with_shardings(state, shardings)


PLAIN = WeightOptions()


def open_model(path: str | Path, quantize: Format | None = None) -> ModelDirectory:
    """A converted model, or a diffusers folder, which needs only its config files. Raises UserError.

    Args:
      quantize: of a folder: the format of the kernels of its transformer and text encoders.
    """
    path = as_path(path)
    if (path / DESCRIPTION).is_file() or not (path / "model_index.json").is_file():
        if quantize is not None:
            raise UserError(f"{path} is a converted model, whose kernels are as they are: leave --quantize out")
        return ModelDirectory.open(path)
    family = families.of_pipeline(read_json(path / "model_index.json").get("_class_name"), path)
    components = {
        name: ComponentDescription(network.class_name, read_json(path / name / "config.json"))
        for name, network in family.networks.items()
    }
    directory = ModelDirectory(path, ModelDescription(family.pipeline, components, {}, fingerprint="", files={}))
    for name in formats_of(family, quantize):
        quantization = family.networks[name].quantization(directory.config(name), quantize)
        components[name] = dataclasses.replace(components[name], quantization=quantization)
    return directory


def open_for(
    recipe: Recipe, mesh: Mesh, batch: int, weights: WeightOptions, micro_batches: int = 1
) -> tuple[ModelDirectory, int]:
    """The recipe's model, and its number of image tokens. Raises UserError if model, size or batch do not fit."""
    directory = open_model(recipe.model, weights.quantize)
    rows, columns = token_grid(*recipe.largest, directory.config("vae").factor)
    check_batch(batch, mesh, directory.config("transformer").num_attention_heads, micro_batches)
    return directory, rows * columns


def text_encoder(recipe: Recipe, mesh: Mesh, batch: int, weights: WeightOptions = PLAIN) -> Program:
    """The largest text encoder of a recipe's model, from token ids to hidden states.

    Raises:
      UserError: if model, size or batch do not fit.
    """
    directory, _ = open_for(recipe, mesh, batch, weights)
    prompts = directory.family.prompts
    networks = {name: directory.abstract(name, jnp.dtype(recipe.dtype)) for name in prompts.ENCODERS}
    name = max(networks, key=lambda name: parameters(nnx.state(networks[name])))
    length = max_length(directory.path / prompts.ENCODERS[name], prompts.MAX_TOKENS)
    graphdef, state = nnx.split(networks[name])
    ids = ShapeDtypeStruct((batch, length), jnp.int32, sharding=batched(mesh))
    return Program(apply_encoder, (graphdef, weights.place(mesh, state), ids), {}, passes=1)


def sampler(recipe: Recipe, mesh: Mesh, batch: int, weights: WeightOptions = PLAIN) -> Program:
    """The few-step sampler of a recipe's student, from noise to latents.

    Raises:
      UserError: if model, size or batch do not fit.
    """
    directory, tokens = open_for(recipe, mesh, batch, weights)
    dtype = jnp.dtype(recipe.dtype)

    graphdef, base, adapter = split_model(directory.student(recipe.adapter, dtype))
    if merges(directory, None, weights.offload):
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
    arguments = (graphdef, weights.place(mesh, state), latents, conditioning, scalar, scalar)
    return Program(sample_student, arguments, {"steps": steps}, passes=steps)


def vae_decoder(recipe: Recipe, mesh: Mesh, batch: int, weights: WeightOptions = PLAIN) -> Program:
    """The VAE's decoder, from latents to pixels, in tiles where sampling does so by default.

    Raises:
      UserError: if model, size or batch do not fit.
    """
    directory, tokens = open_for(recipe, mesh, batch, weights)
    rows, columns = token_grid(*recipe.largest, directory.config("vae").factor)
    vae: Any = directory.abstract("vae", jnp.dtype(recipe.dtype))
    graphdef, state = nnx.split(vae.decoder_alone())
    channels = directory.config("transformer").in_channels
    latents = ShapeDtypeStruct((batch, tokens, channels), jnp.float32, sharding=batched(mesh))
    return Program(
        decode_latents, (graphdef, sharded(mesh, state), latents), {"rows": rows, "columns": columns}, passes=1
    )


def training_step(recipe: Recipe, mesh: Mesh, batch: int, weights: WeightOptions = PLAIN, *, steady: bool) -> Program:
    """One training step of a recipe's distillation; `steady` is the phase after the teacher's share reached zero.

    Raises:
      UserError: if model, size or batch do not fit.
    """
    if weights.offload is not None:
        raise UserError("a training step needs all blocks on the device: leave --offload out")
    directory, tokens = open_for(recipe, mesh, batch, weights, recipe.accumulate)
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


PROGRAMS: dict[str, Callable[[Recipe, Mesh, int, WeightOptions], Program]] = {
    "text-encoder": text_encoder,
    "sampler": sampler,
    "vae-decoder": vae_decoder,
    "train": functools.partial(training_step, steady=False),
    "train-steady": functools.partial(training_step, steady=True),
}
