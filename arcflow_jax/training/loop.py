"""The training loop: distils a converted teacher into a few-step student."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from arcflow_jax.checkpoints.training import DESCRIPTION, AdapterDescription, Checkpoints
from arcflow_jax.data.batches import Ahead, Size
from arcflow_jax.errors import Preempted, UserError, of_files
from arcflow_jax.generate import random_key
from arcflow_jax.networks.conditioning import referring
from arcflow_jax.parallel.failure import ends_together
from arcflow_jax.parallel.mesh import state_shardings
from arcflow_jax.parallel.offload import to_host
from arcflow_jax.parallel.preemption import Preemption
from arcflow_jax.parallel.processes import is_main
from arcflow_jax.parallel.together import check_directory, sum_over_rows, writing_together
from arcflow_jax.references import rules_of
from arcflow_jax.storage.paths import as_path
from arcflow_jax.training.compile import compile_steps, memory_errors
from arcflow_jax.training.embeddings import CachedPrompts
from arcflow_jax.training.latents import LatentEncoder
from arcflow_jax.training.plan import Plan, check_plan, step_settings
from arcflow_jax.training.recipe import Recipe
from arcflow_jax.training.report.log import RunLog, traceback_in
from arcflow_jax.training.report.preview import Preview, optional_preview
from arcflow_jax.training.report.trace import Trace
from arcflow_jax.training.start import starting_state

# What a training step takes: this process's prompts, the image size, and the pixels of images [I, B, H, W, 3]
Loaded = tuple[list[str], Size, np.ndarray | None]


def train(recipe: Recipe, *, step: int | None = None, profile: str | None = None) -> Path:
    """Runs a recipe to its end, from where an interrupted run of the same directory stopped; returns the directory.

    Args:
      step: the checkpoint to resume from; by default the newest. Newer ones move to checkpoints-aside/.
      profile: "A:B" writes a JAX trace of training steps A to B, counted from 1, to the directory's profile/.

    Raises:
      UserError: if the model, the prompts or the directory do not fit the recipe, another process trains there, the
        newest checkpoint is damaged, too many training steps in a row were not finite, or something could not be
        written.
      Preempted: on SIGTERM, once a checkpoint is written.
      Exception: anything else. Its traceback is in the directory's error-PROCESS.log. On several processes, all end.
    """
    run = as_path(recipe.out)
    if step is not None and not (run / DESCRIPTION).exists():  # before the directory is made
        raise UserError(f"{run} has no checkpoint {step}: no run was begun there; leave --step out")
    with ends_together(), traceback_in(run), writing_together(run):
        return train_alone(recipe, run, step, profile)


def train_alone(recipe: Recipe, run: Path, step: int | None, profile: str | None) -> Path:
    """Does what `train` says, while this is the only run that writes to `run`."""
    trace = Trace(profile, run / "profile")
    plan = Plan.make(recipe)
    recipe, mesh = plan.recipe, plan.mesh
    batches = plan.batches()
    to_latents = LatentEncoder(plan.directory, recipe.dtype, mesh, recipe.accumulate) if plan.images else None
    if recipe.embeddings:
        needed = [*plan.prompts.texts, *recipe.other_prompts]
        encode = CachedPrompts(recipe.embeddings, plan.directory, recipe.dtype, mesh, needed)
    else:
        encode = plan.directory.family.prompts(plan.directory, recipe.dtype, mesh)
    begin(run, plan)
    base = plan.directory.load("transformer", plan.base, state_shardings(mesh, plan.base))
    key = random_key(recipe.seed)

    with (
        Preemption() as preemption,
        Checkpoints(run, recipe.keep_last, recipe.keep_every) as checkpoints,
        ends_together(),  # here as well, because closing the checkpoints waits for all processes
    ):
        state = starting_state(plan, base, key, checkpoints, step)
        if recipe.offload_optimizer:
            state = state.moved(to_host)
        done = int(state.step)
        trace.check(done, recipe.steps)
        settings = step_settings(recipe, plan.graphdef, mesh, plan.remat)
        rows, columns = plan.largest_grid
        preview = None
        if recipe.preview_every and done < recipe.steps:
            with optional_preview():
                drawing = Preview(
                    recipe,
                    plan.directory,
                    encode,
                    plan.graphdef,
                    base,
                    mesh,
                    rows=rows,
                    columns=columns,
                    to_latents=to_latents,
                    examples=plan.instructions[: len(recipe.preview_prompts)],
                )
                drawing.sheet(state)  # compiles its programs, before hours of training
                preview = drawing
        negative = latents = values = None
        if recipe.distillation.teacher_guidance == "cfg":
            prompts = [recipe.distillation.negative_prompt] * len(plan.rows)
            # Only its text is used, so its image size does not matter
            negative = encode(prompts, guidance=recipe.guidance, rows=rows, columns=columns)

        def load(i: int) -> Loaded:
            """What a training step takes from the host's memory and disks, ready for the devices."""
            examples, size = batches[i]
            prompts = [image.caption for image in examples] if to_latents is not None else examples
            encode.prepare(prompts)
            return prompts, size, to_latents.pixels(examples, *size) if to_latents is not None else None

        data = Ahead(load, range(done, recipe.steps))
        with RunLog(run, recipe, done) as log, trace, data:
            log.say(str(plan.prompts))
            log.say(plan.header() + (f"; resumes after training step {done}" if done else ""))

            def save() -> None:
                log.upload()  # or a run that is killed after this checkpoint would lack lines up to it
                checkpoints.save(int(state.step), state.items())

            for i in range(done, recipe.steps):
                trace.before(i + 1)
                prompts, size, images = data.take(functools.partial(is_computing, values))
                rows, columns = plan.grids[size]
                conditioning = encode(prompts, guidance=recipe.guidance, rows=rows, columns=columns)
                if images is not None and recipe.references:
                    positions = rules_of(plan.directory).positions([(rows, columns)] * len(images))
                    conditioning = referring(conditioning, to_latents.references(images, positions))
                elif images is not None:
                    latents = to_latents(images[0])
                arguments = (state, base, conditioning, key, negative, latents)
                if i == done:
                    wanted, offload = plan.programs(batches, done), recipe.offload_optimizer
                    programs = compile_steps(wanted, *arguments, settings, mesh, offload)
                program = programs[(rows, columns), plan.steady(i)]
                log.flops += program.flops
                with memory_errors(rows * columns):
                    state, values = program(*arguments)
                trace.after(i + 1, values)
                if due(recipe.log_every, i + 1, recipe):
                    cut = sum_over_rows(encode.cut, mesh)
                    line = log.step(i + 1, values | {"prompts_cut": cut, "waited": data.waited})
                    if line["skipped_in_row"] > recipe.max_skipped:
                        save()
                        checkpoints.wait()  # once the error is reported, the other processes exit within seconds
                        raise UserError(too_many_skipped(line, run))
                    checkpoints.check()
                if preview is not None and due(recipe.preview_every, i + 1, recipe):
                    with optional_preview():
                        log.image(i + 1, preview.sheet(state))
                if due(recipe.save_every, i + 1, recipe):
                    save()
                if preemption.reached(i + 1) and i + 1 < recipe.steps:
                    save()
                    raise Preempted(
                        f"preempted: checkpoint at step {i + 1} of {recipe.steps} written to {run}; run the same "
                        "command to resume"
                    )
        checkpoints.save(int(state.step), state.items())
    cut = sum_over_rows(encode.cut, mesh)
    if cut and is_main():
        print(f"{cut} prompts had more tokens than the text encoder takes, and were cut", flush=True)
    return run


def is_computing(values: dict[str, jax.Array] | None) -> bool:
    """Whether the devices still compute what a training step returns to be logged; None is before the first one."""
    return values is not None and not values["loss"].is_ready()


def due(every: int, done: int, recipe: Recipe) -> bool:
    """Whether what happens every so many training steps (0 is never), and at the end, happens now."""
    return every > 0 and (done % every == 0 or done == recipe.steps)


def too_many_skipped(line: dict[str, Any], run: Path) -> str:
    """The error of a run that stops after too many skipped training steps; `line` is the last of its log."""
    return (
        f"stopped: loss, gradient or update of the last {line['skipped_in_row']} training steps was not finite. "
        f"Checkpoint {line['step']} in {run} holds the weights from before them: try a lower learning rate, or --step "
        "with an older checkpoint"
    )


def begin(run: Path, plan: Plan) -> None:
    """Makes the run's directory, or checks that the run that is there is the same. Raises UserError."""
    recipe = plan.recipe
    transformer = plan.directory.description.components["transformer"]
    settings = (recipe.adapter, recipe.distillation, recipe.guidance)
    check_plan(plan)  # before anything is written
    recipe.check_same(run)
    describe(
        run, AdapterDescription(plan.directory.fingerprint, *settings, transformer, plan.directory.family.pipeline)
    )
    recipe.write(run)
    check_directory(run)  # which waits until all have looked and the first has written


def describe(run: Path, description: AdapterDescription) -> None:
    """Makes the run's directory, or checks that its adapter is the same. Raises UserError."""
    try:
        if (run / DESCRIPTION).exists() and AdapterDescription.read(run) != description:
            raise UserError(f"{run} holds a run of other settings or another base model: name another --config.out")
        if is_main():
            run.mkdir(parents=True, exist_ok=True)
            description.write(run)
    except OSError as error:
        raise of_files(f"cannot write to {run}", error) from error
