"""The training loop: distils a converted teacher into a few-step student."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from arcflow_jax import arc_model
from arcflow_jax.checkpoint import DESCRIPTION, AdapterDescription, Checkpoints
from arcflow_jax.config import Recipe
from arcflow_jax.data import draw_resolution, prompt_batches
from arcflow_jax.distributed import is_main, local_part
from arcflow_jax.embeddings import CachedPrompts
from arcflow_jax.errors import Preempted, UserError
from arcflow_jax.latents import token_grid
from arcflow_jax.model_directory import ModelDirectory
from arcflow_jax.optim import make_optimizer
from arcflow_jax.pictures import LatentEncoder, Picture, captions, read_pictures
from arcflow_jax.preemption import Preemption
from arcflow_jax.preview import Preview
from arcflow_jax.prompt_sources import Prompts, read_prompts
from arcflow_jax.prompts import PROMPTS
from arcflow_jax.run_log import RunLog
from arcflow_jax.sharding import make_mesh, state_shardings
from arcflow_jax.trace import Trace
from arcflow_jax.train_state import TrainState, train_step


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
    pictures: list[Picture] | None
    grids: dict[tuple[int, int], tuple[int, int]]
    graphdef: nnx.GraphDef
    base: nnx.State
    adapter: nnx.State
    optimizer: optax.GradientTransformation

    @classmethod
    def of(cls, recipe: Recipe) -> Plan:
        """Raises UserError if the model or the prompts do not fit the recipe, or wandb is asked for and not there."""
        if recipe.wandb_project and importlib.util.find_spec("wandb") is None:
            raise UserError("wandb_project asks for Weights & Biases, which is not installed: pip install wandb")
        directory = ModelDirectory.open(recipe.model)
        mesh = make_mesh(recipe.mesh)
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if recipe.batch % shards:
            raise UserError(f"batch {recipe.batch} does not divide by data × fsdp = {shards} of the mesh")
        factor = directory.geometry("vae").factor
        grids = {resolution: token_grid(*resolution, factor) for resolution in recipe.resolutions}
        pictures = read_pictures(recipe.images) if recipe.images else None
        if pictures is None:
            prompts = read_prompts(recipe.prompts, recipe.prompts_field)
        else:
            prompts = captions(recipe.images, pictures)
        graphdef, base, adapter = arc_model.split(directory.student(recipe.adapter, recipe.dtype))
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


def train(recipe: Recipe, *, step: int | None = None, profile: str | None = None) -> Path:
    """Runs a recipe to its end, from where an interrupted run of the same directory stopped; returns the directory.

    Args:
      step: the checkpoint to go on from; by default the newest. Newer ones are deleted.
      profile: "A:B" writes a JAX trace of iterations A to B, counted from 1, to the directory's profile/.

    Raises:
      UserError: if the model, the prompts or the directory do not fit the recipe, the newest checkpoint is damaged,
        too many iterations in a row were not finite, or something could not be written.
      Preempted: on SIGTERM, once a checkpoint is written.
    """
    run = Path(recipe.out)
    trace = Trace(profile, run / "profile")
    plan = Plan.of(recipe)
    mesh = plan.mesh
    batches = prompt_batches(plan.pictures or plan.prompts.texts, recipe.batch, recipe.seed, local_part(mesh))
    to_latents = LatentEncoder(plan.directory, recipe.dtype, mesh) if plan.pictures else None
    if recipe.embeddings:
        needed = [*plan.prompts.texts, *recipe.other_prompts]
        encode = CachedPrompts(recipe.embeddings, plan.directory, recipe.dtype, mesh, needed)
    else:
        encode = PROMPTS[plan.directory.description["pipeline"]](plan.directory, recipe.dtype, mesh)
    begin(run, recipe, plan)
    base = plan.directory.load("transformer", plan.base, state_shardings(mesh, plan.base))
    key = jax.random.key(recipe.seed)

    with Preemption() as preemption, Checkpoints(run, recipe.keep_last, recipe.keep_every) as checkpoints:
        state = start(plan.graphdef, base, plan.adapter, key, mesh, plan.optimizer)
        if checkpoints.latest is not None or step is not None:
            state = checkpoints.restore(state, step)
        done = int(state.step)
        trace.check(done, recipe.steps)
        mixed, steady = (
            jitted_step(recipe, plan.graphdef, plan.optimizer, mesh, steady=flag) for flag in (False, True)
        )
        if recipe.preview_every:
            rows, columns = plan.grids[recipe.largest]
            preview = Preview(recipe, plan.directory, encode, plan.graphdef, base, mesh, rows=rows, columns=columns)
        negative = latents = None
        if recipe.distillation.teacher_guidance == "cfg":
            rows, columns = plan.grids[recipe.largest]  # of which it takes only the text
            prompts = [recipe.distillation.negative_prompt] * len(batches[0])
            negative = encode(prompts, guidance=recipe.guidance, rows=rows, columns=columns)

        with RunLog(run, recipe, done) as log, trace:
            log.say(str(plan.prompts))
            log.say(plan.header() + (f"; goes on after iteration {done}" if done else ""))
            for i in range(done, recipe.steps):
                trace.before(i + 1)
                prompts, resolution = batches[i], draw_resolution(recipe.resolutions, recipe.seed, i)
                if to_latents is not None:
                    latents = to_latents(prompts, *resolution)
                    prompts = [picture.caption for picture in prompts]
                rows, columns = plan.grids[resolution]
                conditioning = encode(prompts, guidance=recipe.guidance, rows=rows, columns=columns)
                one_step = steady if i >= recipe.distillation.decay else mixed
                with jax.set_mesh(mesh):  # which fused attention needs to know
                    state, values = one_step(state, base, conditioning, key, negative, latents)
                trace.after(i + 1, values)
                if due(recipe.log_every, i + 1, recipe):
                    line = log.iteration(i + 1, values | {"prompts_cut": encode.cut})
                    if line["skipped_in_row"] > recipe.max_skipped:
                        checkpoints.save(state)
                        raise UserError(too_many_skipped(line, run))
                    checkpoints.check()
                if due(recipe.preview_every, i + 1, recipe):
                    log.picture(i + 1, preview.sheet(state))
                if due(recipe.save_every, i + 1, recipe):
                    checkpoints.save(state)
                if preemption.reached(i + 1) and i + 1 < recipe.steps:
                    checkpoints.save(state)
                    raise Preempted(
                        f"told to end: {run} keeps iteration {i + 1} of {recipe.steps}, and the same command goes on"
                    )
        checkpoints.save(state)
    if encode.cut:
        print(f"{encode.cut} prompts had more tokens than the encoder takes, and were cut", flush=True)
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


def due(every: int, done: int, recipe: Recipe) -> bool:
    """Whether something that happens each so many iterations, 0 is never, and at the end happens now."""
    return every > 0 and (done % every == 0 or done == recipe.steps)


def too_many_skipped(line: dict[str, Any], run: Path) -> str:
    """What a run says that stops because of it, with the last line of its log."""
    return (
        f"stopped: the loss or gradient of the last {line['skipped_in_row']} iterations was not finite; {run} keeps "
        f"checkpoint {line['step']}, as it was before them: a lower learning rate may help, or --step and an older one"
    )


def begin(run: Path, recipe: Recipe, plan: Plan) -> None:
    """Makes the run's directory, or checks that the run that is there is the same. Raises UserError."""
    transformer = plan.directory.description["components"]["transformer"]
    settings = (recipe.adapter, recipe.distillation, recipe.guidance)
    recipe.check_same(run)
    describe(run, AdapterDescription(plan.directory.fingerprint, *settings, transformer))
    recipe.write(run)
    if jax.process_count() > 1:  # until all have looked and the first has written
        multihost_utils.sync_global_devices("the run's directory")


def describe(run: Path, description: AdapterDescription) -> None:
    """Makes the run's directory, or checks that its adapter is the same. Raises UserError."""
    try:
        if (run / DESCRIPTION).exists() and AdapterDescription.read(run) != description:
            raise UserError(f"{run} holds a run of other settings or another base: name another --config.out")
        if is_main():
            run.mkdir(parents=True, exist_ok=True)
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
