"""The training loop: distils a converted teacher into a few-step student."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from arcflow_jax import arc_model
from arcflow_jax.checkpoint import DESCRIPTION, AdapterDescription, Checkpoints
from arcflow_jax.config import Recipe
from arcflow_jax.data import prompt_batches
from arcflow_jax.distributed import is_main, local_part
from arcflow_jax.errors import UserError
from arcflow_jax.latents import token_grid
from arcflow_jax.model_directory import ModelDirectory
from arcflow_jax.optim import make_optimizer
from arcflow_jax.pictures import LatentEncoder, read_pictures
from arcflow_jax.prompts import PROMPTS, read_prompts
from arcflow_jax.sharding import make_mesh, state_shardings
from arcflow_jax.train_state import TrainState, train_step


def train(recipe: Recipe) -> Path:
    """Runs a recipe to its end, from where an interrupted run of the same directory stopped; returns the directory.

    Raises:
      UserError: if the model, the prompts or the directory do not fit the recipe.
    """
    directory = ModelDirectory.open(recipe.model)
    mesh = make_mesh(recipe.mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if recipe.batch % shards:
        raise UserError(f"batch {recipe.batch} does not divide by data × fsdp = {shards} of the mesh")
    rows, columns = token_grid(recipe.height, recipe.width, directory.geometry("vae").factor)
    examples = read_pictures(recipe.images) if recipe.images else read_prompts(recipe.prompts)
    batches = prompt_batches(examples, recipe.batch, recipe.seed, local_part(mesh))
    to_latents = LatentEncoder(directory, recipe.dtype, mesh) if recipe.images else None
    encode = PROMPTS[directory.description["pipeline"]](directory, recipe.dtype, mesh)

    graphdef, abstract_base, abstract = arc_model.split(directory.student(recipe.adapter, recipe.dtype))
    optimizer = make_optimizer(recipe.optimizer, abstract)

    run = Path(recipe.out)
    transformer = directory.description["components"]["transformer"]
    settings = (recipe.adapter, recipe.distillation, recipe.guidance)
    describe(run, AdapterDescription(directory.fingerprint, *settings, transformer))
    base = directory.load("transformer", abstract_base, state_shardings(mesh, abstract_base))
    key = jax.random.key(recipe.seed)
    with Checkpoints(run) as checkpoints, open(run / "log.jsonl" if is_main() else os.devnull, "a") as log:
        state = start(graphdef, base, abstract, key, mesh, optimizer)
        if checkpoints.latest is not None:
            state = checkpoints.restore(state)
        mixed, steady = (jitted_step(recipe, graphdef, optimizer, mesh, steady=flag) for flag in (False, True))

        text = functools.partial(encode, guidance=recipe.guidance, rows=rows, columns=columns)
        negative = latents = None
        if recipe.distillation.teacher_guidance == "cfg":
            negative = text([recipe.distillation.negative_prompt] * len(batches[0]))

        with progress_bar() as progress:
            task = progress.add_task("distilling", total=recipe.steps, completed=int(state.step), loss="–")
            for i in range(int(state.step), recipe.steps):
                prompts = batches[i]
                if to_latents is not None:
                    latents = to_latents(prompts, recipe.height, recipe.width)
                    prompts = [picture.caption for picture in prompts]
                conditioning = text(prompts)
                one_step = steady if i >= recipe.distillation.decay else mixed
                with jax.set_mesh(mesh):  # which fused attention needs to know
                    state, values = one_step(state, base, conditioning, key, negative, latents)
                if (i + 1) % recipe.log_every == 0 or i + 1 == recipe.steps:
                    loss = write_log(log, i + 1, values)
                    progress.update(task, completed=i + 1, loss=f"{loss:.4f}")
                    if is_main() and not progress.console.is_terminal:  # where no bar can move: a log file, CI
                        left = progress.tasks[task].time_remaining or 0
                        print(f"iteration {i + 1} of {recipe.steps}, loss {loss:.4f}, {left:.0f} s left", flush=True)
                if (i + 1) % recipe.save_every == 0:
                    checkpoints.save(state)
        checkpoints.save(state)
    return run


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


def describe(run: Path, description: AdapterDescription) -> None:
    """Makes the run's directory, or checks that the run that is there is the same. Raises UserError."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        if (run / DESCRIPTION).exists() and AdapterDescription.read(run) != description:
            raise UserError(f"{run} holds a run of other settings or another base: name another --config.out")
        if is_main():
            description.write(run)
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror}") from None


def start(
    graphdef: nnx.GraphDef,
    base: nnx.State,
    abstract: nnx.State,
    key: jax.Array,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The state that a run begins with, made in its sharding; `abstract` is the adapter's structure."""

    def make(base: nnx.State) -> TrainState:
        return TrainState.create(arc_model.start_adapter(graphdef, base, abstract, key), optimizer)

    shapes = jax.eval_shape(lambda adapter: TrainState.create(adapter, optimizer), abstract)
    return jax.jit(make, out_shardings=state_shardings(mesh, shapes))(base)


def progress_bar() -> Progress:
    """Bar, iterations, time spent and left, and the loss; of several processes the first one's."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
        disable=not is_main(),
    )


def write_log(log: IO[str], step: int, values: dict[str, jax.Array]) -> float:
    """One JSON line of what an iteration logged; returns its loss. This waits for the device."""
    line = {"step": step, "time": time.time(), **{name: jnp.asarray(value).tolist() for name, value in values.items()}}
    log.write(json.dumps(line) + "\n")
    log.flush()
    return line["loss"]
