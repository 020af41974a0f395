"""What a recipe comes to before anything large is loaded: shapes, shardings, and the settings of a step."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from arcflow_jax.data.batches import BucketedBatches, MixedBatches, Size
from arcflow_jax.data.images import CaptionedImages, captions, read_images_once
from arcflow_jax.data.prompts import Prompts, read_prompts
from arcflow_jax.errors import UserError
from arcflow_jax.families.latents import token_grid
from arcflow_jax.models.model_cache import converted
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.conditioning import References, referring
from arcflow_jax.networks.layers import Remat
from arcflow_jax.networks.student import initial_adapter, split_model
from arcflow_jax.parallel.mesh import (
    MESH_AXES,
    Sizes,
    auto_sizes,
    batched,
    check_batch,
    islands,
    make_mesh,
    memory_limit,
    replicated,
    slices,
    state_shardings,
)
from arcflow_jax.parallel.processes import local_rows
from arcflow_jax.parallel.together import check_same
from arcflow_jax.references import rules_of
from arcflow_jax.training.optimizer import make_optimizer
from arcflow_jax.training.recipe import Recipe
from arcflow_jax.training.remat import remat_policy
from arcflow_jax.training.state import TrainState

OFFLOADED = {"EMA weights", "optimizer"}  # what `offload_optimizer` keeps in host memory, except during the update
SHOWN = 8  # image sizes that the header lists
FOR_STATE = 2 / 3  # of a device's memory; activations take the rest
# Fields of a recipe that name places; each host may have its own copy
PLACES = {"model", "prompts", "images", "references", "embeddings", "start_from"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe comes to before anything large is loaded.

    Attributes:
      recipe: with the LoRA targets of the model's family, where it named none.
      prompts: to train on; the images' captions, if there are images.
      images: to start from, or reference images; None for a run without any.
      grids: rows and columns of tokens, by image size.
      graphdef, base, adapter: of the model, split; shapes in place of arrays.
      held: what devices hold all the time, by name, as shapes.
      remat: what the backward pass computes again.
    """

    recipe: Recipe
    directory: ModelDirectory
    mesh: Mesh
    prompts: Prompts
    images: list[CaptionedImages] | None
    grids: dict[Size, tuple[int, int]]
    graphdef: nnx.GraphDef
    base: nnx.State
    adapter: nnx.State
    optimizer: optax.GradientTransformation
    held: dict[str, Any]
    remat: Remat

    @classmethod
    def make(cls, recipe: Recipe) -> Plan:
        """Raises UserError if model or prompts do not fit the recipe, or wandb is asked for but not installed."""
        if recipe.wandb_project and importlib.util.find_spec("wandb") is None:
            raise UserError("wandb_project asks for Weights & Biases, which is not installed: pip install wandb")
        directory = ModelDirectory.open(converted(recipe.model))
        recipe = dataclasses.replace(recipe, adapter=recipe.adapter.with_targets(directory.family.lora_targets))
        graphdef, base, adapter = split_model(directory.student(recipe.adapter, recipe.dtype))
        optimizer = make_optimizer(recipe.optimizer, adapter)
        held = held_in_training(base, adapter, optimizer)
        if not recipe.embeddings:
            held["text encoders"] = encoders(directory, recipe.dtype)
        mesh = training_mesh(recipe, directory, held)
        prompts, images = examples(recipe, directory)
        factor = directory.config("vae").factor
        sizes = dict.fromkeys(prompts.sizes or recipe.resolutions)
        grids = {size: token_grid(*size, factor) for size in sizes}
        tokens = max(math.prod(grid) for grid in grids.values())
        network = (graphdef, base, adapter)
        count = len(images[0].files) if images and recipe.references else 0
        remat = chosen_remat(recipe, directory, mesh, tokens, *network, held, count)
        return cls(recipe, directory, mesh, prompts, images, grids, *network, optimizer, held, remat)

    @property
    def largest_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of the largest image size."""
        return max(self.grids.values(), key=math.prod)

    @property
    def instructions(self) -> list[CaptionedImages]:
        """The reference images with their instructions, if the run has them."""
        return (self.images or []) if self.recipe.references else []

    @property
    def rows(self) -> list[int]:
        """Which rows of each batch this process loads."""
        return local_rows(self.mesh, self.recipe.batch)

    def batches(self) -> MixedBatches | BucketedBatches:
        """What each training step takes: this process's rows of the batch, and the image size."""
        recipe, examples, rows = self.recipe, self.images or self.prompts.texts, self.rows
        if self.prompts.sizes:
            return BucketedBatches(examples, self.prompts.sizes, recipe.batch, recipe.seed, rows)
        return MixedBatches(examples, recipe.resolutions, recipe.batch, recipe.seed, rows)

    def steady(self, step: int) -> bool:
        """Whether a training step, counted from 0, is one of the second phase, in which the teacher's share is 0."""
        settings = self.recipe.distillation
        return step >= settings.decay and not settings.least_share

    def programs(self, batches: MixedBatches | BucketedBatches, done: int) -> dict[tuple[tuple[int, int], bool], None]:
        """What the training steps after `done` have compiled: grid of tokens and phase, in the order of first use."""
        left = range(done, self.recipe.steps)
        return dict.fromkeys((self.grids[batches.size(i)], self.steady(i)) for i in left)

    def trained_and_whole(self) -> tuple[int, int]:
        """The number of parameters that are trained, and that of the teacher before it was quantized."""
        teacher = self.directory.networks["transformer"].abstract(self.directory.config("transformer"))
        return parameters(self.adapter), parameters(nnx.state(teacher))

    def header(self) -> str:
        """How much is trained, and on what."""
        size = ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        trained, whole = self.trained_and_whole()
        share = f"{trained / 1e6:.2f} of {whole / 1e6:.2f} million parameters ({100 * trained / whole:.2f} %)"
        text = f"trains {share} on {self.mesh.size} × {self.mesh.devices.flat[0].device_kind}: {size}"
        if self.prompts.sizes:
            counts = collections.Counter(self.prompts.sizes).most_common()
            shown = ", ".join(f"{height} × {width} ({count} prompts)" for (height, width), count in counts[:SHOWN])
            text += f"\n{len(counts)} image sizes: {shown}" + (", …" if len(counts) > SHOWN else "")
        return text


def examples(recipe: Recipe, directory: ModelDirectory) -> tuple[Prompts, list[CaptionedImages] | None]:
    """What a recipe trains on: prompts, and the images that they belong to.

    Raises:
      UserError: if they cannot be read, or the model reads no reference images.
    """
    if recipe.references:
        images = read_images_once(recipe.references, rules_of(directory).most)
    elif recipe.images:
        images = read_images_once(recipe.images)
    else:
        return read_prompts(recipe.prompts, recipe.prompts_field), None
    return captions(recipe.references or recipe.images, images), images


def held_in_training(base: nnx.State, adapter: nnx.State, optimizer: optax.GradientTransformation) -> dict[str, Any]:
    """What devices hold of the backbone all the time, by name, as shapes."""
    moments = jax.eval_shape(optimizer.init, adapter)
    gradients = (adapter, adapter)  # of a segment, and the sum of those before it
    return {"base": base, "adapter": adapter, "EMA weights": adapter, "optimizer": moments, "gradients": gradients}


def encoders(directory: ModelDirectory, dtype: str) -> list[nnx.State]:
    """The weights of a model's text encoders, as shapes."""
    names = [name for name in directory.description.components if name.startswith("text_encoder")]
    return [nnx.state(directory.abstract(name, dtype)) for name in names]


def bytes_per_device(mesh: Mesh | AbstractMesh, abstract: Any) -> int:
    """Bytes of a tree of variables that one device holds."""
    leaves = zip(jax.tree.leaves(abstract), jax.tree.leaves(state_shardings(mesh, abstract)), strict=True)
    return sum(math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize for x, sharding in leaves)


def training_mesh(
    recipe: Recipe, directory: ModelDirectory, held: Mapping[str, Any], devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The recipe's mesh over all devices.

    Args:
      held: what devices hold all the time, as shapes.

    Raises:
      UserError: if mesh, batch and devices do not fit together; it names a mesh and a batch that do.
    """
    devices = jax.devices() if devices is None else devices
    heads = directory.config("transformer").num_attention_heads
    if recipe.mesh != "auto":
        mesh = make_mesh(recipe.mesh, devices)
        check_batch(recipe.batch, mesh, heads, recipe.accumulate)
        return mesh

    def bytes_held(sizes: Sizes) -> int:
        return bytes_per_device(AbstractMesh(sizes, MESH_AXES), held)

    memory = FOR_STATE * memory_limit()
    groups = {"islands": islands(devices), "slices": slices(devices)}
    sizes = auto_sizes(len(devices), recipe.batch // recipe.accumulate, heads, bytes_held, memory=memory, **groups)
    return make_mesh(sizes, devices)


def parameters(state: nnx.State) -> int:
    """The number of parameters in a state."""
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def chosen_remat(
    recipe: Recipe,
    directory: ModelDirectory,
    mesh: Mesh,
    tokens: int,
    graphdef: nnx.GraphDef,
    base: nnx.State,
    adapter: nnx.State,
    held: Mapping[str, Any],
    references: int = 0,
) -> Remat:
    """What the backward pass computes again: the recipe's `remat` or, if that is "auto", what fits.

    Args:
      tokens: of the largest image.
      held: what devices hold all the time, as shapes.
      references: how many reference images of that size an example has.
    """
    conditioning = directory.family.prompts.abstract_conditioning(
        directory, mesh, recipe.batch // recipe.accumulate, tokens, jnp.dtype(recipe.dtype)
    )
    if references:
        batch, each = conditioning.batch_size, (references * tokens,)
        whole = jax.ShapeDtypeStruct((*each, *conditioning.positions.shape[1:]), jnp.float32, sharding=replicated(mesh))
        features = directory.config("transformer").in_channels
        latents = jax.ShapeDtypeStruct((batch, *each, features), jnp.float32, sharding=batched(mesh))
        conditioning = referring(conditioning, References(latents, whole))
    kept = {name: x for name, x in held.items() if not (recipe.offload_optimizer and name in OFFLOADED)}
    return remat_policy(recipe.remat, graphdef, base, adapter, conditioning, mesh, bytes_per_device(mesh, kept))


def step_settings(recipe: Recipe, graphdef: nnx.GraphDef, mesh: Mesh, remat: Remat = "full") -> dict[str, Any]:
    """The keyword arguments of `train_step`, but `steady`."""
    return {
        "graphdef": graphdef,
        "settings": recipe.distillation,
        "guidance": recipe.guidance,
        "optimizer": recipe.optimizer,
        "ema": recipe.ema,
        "mesh": mesh,
        "accumulate": recipe.accumulate,
        "remat": remat,
    }


def initial_state(
    graphdef: nnx.GraphDef,
    base: nnx.State,
    abstract: nnx.State,
    key: jax.Array,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The state that a run begins with at the teacher, made in its sharding; `abstract` is the adapter's structure."""

    def make(base: nnx.State) -> TrainState:
        return TrainState.create(initial_adapter(graphdef, base, abstract, key), optimizer)

    return jax.jit(make, out_shardings=state_shardings(mesh, abstract_state(abstract, optimizer)))(base)


def abstract_state(adapter: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes of a run's state; those of its adapter are given."""
    return jax.eval_shape(lambda adapter: TrainState.create(adapter, optimizer), adapter)


def check_plan(plan: Plan) -> None:
    """Raises UserError in all processes if one has other prompts, another recipe or another model than the first."""
    prompts = plan.prompts
    check_same(
        {
            f"the prompts, of which the first process has {len(prompts.texts)},": [prompts.texts, prompts.sizes],
            "the settings of the recipe": {k: v for k, v in plan.recipe.resolved().items() if k not in PLACES},
            "the weights of the model": plan.directory.fingerprint,
        }
    )
