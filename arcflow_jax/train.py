"""The training loop: distils a converted teacher into a few-step student."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import IO

import jax
import jax.numpy as jnp
from flax import nnx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from arcflow_jax import arc_model
from arcflow_jax.checkpoint import DESCRIPTION, AdapterDescription, Checkpoints
from arcflow_jax.config import Recipe
from arcflow_jax.data import draw_resolution, prompt_batches
from arcflow_jax.embeddings import CachedPrompts
from arcflow_jax.errors import UserError
from arcflow_jax.latents import token_grid
from arcflow_jax.model_directory import ModelDirectory
from arcflow_jax.optim import make_optimizer
from arcflow_jax.prompt_sources import read_prompts
from arcflow_jax.prompts import PROMPTS
from arcflow_jax.sharding import batched, make_mesh, state_shardings
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
    factor = directory.geometry("vae").factor
    grids = {resolution: token_grid(*resolution, factor) for resolution in recipe.resolutions}
    prompts = read_prompts(recipe.prompts, recipe.prompts_field)
    print(prompts, flush=True)
    batches = prompt_batches(prompts.texts, recipe.batch, recipe.seed)
    if recipe.embeddings:
        encode = CachedPrompts(recipe.embeddings, directory, recipe.dtype, mesh, prompts.texts)
    else:
        encode = PROMPTS[directory.description["pipeline"]](directory, recipe.dtype, mesh)

    graphdef, abstract_base, abstract = arc_model.split(directory.student(recipe.adapter, recipe.dtype))
    optimizer = make_optimizer(recipe.optimizer, abstract)

    run = Path(recipe.out)
    transformer = directory.description["components"]["transformer"]
    settings = (recipe.adapter, recipe.distillation, recipe.guidance)
    describe(run, AdapterDescription(directory.fingerprint, *settings, transformer))
    base = directory.load("transformer", abstract_base, state_shardings(mesh, abstract_base))
    key = jax.random.key(recipe.seed)
    with Checkpoints(run) as checkpoints, open(run / "log.jsonl", "a") as log:
        # Jitted, so that it is on the mesh like the states that follow, or the first would be compiled for by itself
        state = jax.jit(functools.partial(TrainState.create, optimizer=optimizer))(
            start(graphdef, base, abstract, key, mesh)
        )
        if checkpoints.latest is not None:
            state = checkpoints.restore(state)
        step = functools.partial(
            train_step,
            graphdef=graphdef,
            settings=recipe.distillation,
            optimizer=optimizer,
            optimizer_config=recipe.optimizer,
            ema=recipe.ema,
            sharding=batched(mesh),
        )
        mixed, steady = (jax.jit(functools.partial(step, steady=flag), donate_argnums=0) for flag in (False, True))

        with progress_bar() as progress:
            task = progress.add_task("distilling", total=recipe.steps, completed=int(state.step), loss="–")
            for i in range(int(state.step), recipe.steps):
                rows, columns = grids[draw_resolution(recipe.resolutions, recipe.seed, i)]
                conditioning = encode(batches[i], guidance=recipe.guidance, rows=rows, columns=columns)
                one_step = steady if i >= recipe.distillation.decay else mixed
                with jax.set_mesh(mesh):  # which fused attention needs to know
                    state, values = one_step(state, base, conditioning, key)
                if (i + 1) % recipe.log_every == 0 or i + 1 == recipe.steps:
                    loss = write_log(log, i + 1, values | {"prompts_cut": encode.cut})
                    progress.update(task, completed=i + 1, loss=f"{loss:.4f}")
                    if not progress.console.is_terminal:  # where no bar can move: a log file, CI
                        left = progress.tasks[task].time_remaining or 0
                        print(f"iteration {i + 1} of {recipe.steps}, loss {loss:.4f}, {left:.0f} s left", flush=True)
                if (i + 1) % recipe.save_every == 0:
                    checkpoints.save(state)
        checkpoints.save(state)
    if encode.cut:
        print(f"{encode.cut} prompts had more tokens than the encoder takes, and were cut", flush=True)
    return run


def describe(run: Path, description: AdapterDescription) -> None:
    """Makes the run's directory, or checks that the run that is there is the same. Raises UserError."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        if (run / DESCRIPTION).exists() and AdapterDescription.read(run) != description:
            raise UserError(f"{run} holds a run of other settings or another base: name another --config.out")
        description.write(run)
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror}") from None


def start(
    graphdef: nnx.GraphDef, base: nnx.State, abstract: nnx.State, key: jax.Array, mesh: jax.sharding.Mesh
) -> nnx.State:
    """The adapter that a run begins with, made in its sharding."""

    def make(base: nnx.State) -> nnx.State:
        return arc_model.start_adapter(graphdef, base, abstract, key)

    return jax.jit(make, out_shardings=state_shardings(mesh, abstract))(base)


def progress_bar() -> Progress:
    """Bar, iterations, time spent and left, and the loss."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )


def write_log(log: IO[str], step: int, values: dict[str, jax.Array]) -> float:
    """One JSON line of what an iteration logged; returns its loss. This waits for the device."""
    line = {"step": step, "time": time.time(), **{name: jnp.asarray(value).tolist() for name, value in values.items()}}
    log.write(json.dumps(line) + "\n")
    log.flush()
    return line["loss"]
