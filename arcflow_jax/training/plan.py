"""What a recipe comes to before anything large is loaded: shapes, shardings, and the compiled step."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from arcflow_jax.checkpoints.model_directory import ModelDirectory
from arcflow_jax.data.images import CaptionedImage, captions, read_images
from arcflow_jax.data.prompts import Prompts, read_prompts
from arcflow_jax.errors import UserError
from arcflow_jax.families.latents import token_grid
from arcflow_jax.networks.student import initial_adapter, split_model
from arcflow_jax.parallel.mesh import make_mesh, state_shardings
from arcflow_jax.training.optimizer import make_optimizer
from arcflow_jax.training.recipe import Recipe
from arcflow_jax.training.state import TrainState, train_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe comes to before anything large is loaded.

    Attributes:
      prompts: or the captions of the pictures.
      pictures: that the run starts from, if it does.
      grids: rows and columns of tokens, by resolution.
      graphdef, base, adapter: of the model, split; shapes in place of arrays.
    """

    directory: ModelDirectory
    mesh: Mesh
    prompts: Prompts
    pictures: list[CaptionedImage] | None
    grids: dict[tuple[int, int], tuple[int, int]]
    graphdef: nnx.GraphDef
    base: nnx.State
    adapter: nnx.State
    optimizer: optax.GradientTransformation

    @classmethod
    def make(cls, recipe: Recipe) -> Plan:
        """Raises UserError if the model or the prompts do not fit the recipe, or wandb is asked for and not there."""
        if recipe.wandb_project and importlib.util.find_spec("wandb") is None:
            raise UserError("wandb_project asks for Weights & Biases, which is not installed: pip install wandb")
        directory = ModelDirectory.open(recipe.model)
        mesh = make_mesh(recipe.mesh)
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if recipe.batch % shards:
            raise UserError(f"batch {recipe.batch} does not divide by data × fsdp = {shards} of the mesh")
        factor = directory.config("vae").factor
        grids = {resolution: token_grid(*resolution, factor) for resolution in recipe.resolutions}
        pictures = read_images(recipe.images) if recipe.images else None
        if pictures is None:
            prompts = read_prompts(recipe.prompts, recipe.prompts_field)
        else:
            prompts = captions(recipe.images, pictures)
        graphdef, base, adapter = split_model(directory.student(recipe.adapter, recipe.dtype))
        optimizer = make_optimizer(recipe.optimizer, adapter)
        return cls(directory, mesh, prompts, pictures, grids, graphdef, base, adapter, optimizer)

    def header(self) -> str:
        """How much is trained, and on what."""
        size = ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        trained, whole = parameters(self.adapter), parameters(self.base)
        share = f"{trained / 1e6:.2f} of {whole / 1e6:.2f} million parameters ({100 * trained / whole:.2f} %)"
        return f"trains {share} on {self.mesh.size} {self.mesh.devices.flat[0].device_kind} devices: {size}"


def parameters(state: nnx.State) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def jitted_step(
    recipe: Recipe, graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, mesh: Mesh, *, steady: bool
) -> Callable[..., Any]:
    """`train_step` of a recipe, compiled for a mesh; `steady` once the teacher's share has reached zero.

    It takes the state's memory, and puts the next state where the last one was.
    """
    step = functools.partial(
        train_step,
        graphdef=graphdef,
        settings=recipe.distillation,
        guidance=recipe.guidance,
        optimizer=optimizer,
        optimizer_config=recipe.optimizer,
        ema=recipe.ema,
        mesh=mesh,
        steady=steady,
    )
    return jax.jit(step, donate_argnums=0)


def initial_state(
    graphdef: nnx.GraphDef,
    base: nnx.State,
    abstract: nnx.State,
    key: jax.Array,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The state that a run begins with, made in its sharding; `abstract` is the adapter's structure."""

    def make(base: nnx.State) -> TrainState:
        return TrainState.create(initial_adapter(graphdef, base, abstract, key), optimizer)

    shapes = jax.eval_shape(lambda adapter: TrainState.create(adapter, optimizer), abstract)
    return jax.jit(make, out_shardings=state_shardings(mesh, shapes))(base)
