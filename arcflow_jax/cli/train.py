"""`arcflow train` and `arcflow embed-prompts`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from arcflow_jax.cli import options
from arcflow_jax.cli.options import path_option


@options.expand_options
def train(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="The recipe: NAME or FILE.py, and :VARIANT if it has some.")],
    step: Annotated[
        int | None,
        typer.Option(
            help="Resume from this checkpoint instead of the newest. Newer ones move to OUT/checkpoints-aside."
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="A:B, write a JAX trace of training steps A to B, counted from 1, to OUT/profile."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only check the inputs, and print the recipe, sizes, memory and the mesh."),
    ] = False,
    xla_preset: Annotated[
        str | None,
        typer.Option(
            help="Flags of XLA for one kind of accelerator: v5p, v6e or h100. Those that XLA_FLAGS or LIBTPU_INIT_ARGS "
            "already have stay as they are."
        ),
    ] = None,
    *,
    hosts: options.HostOptions,
) -> None:
    """Distils a converted teacher into a few-step student.

    Any value of the recipe can be overridden: --config.steps=1000 --config.optimizer.learning_rate=1e-4. If the run's
    directory (--config.out) exists, the run resumes from its last checkpoint. On SIGTERM it writes a checkpoint and
    ends with exit code 143.

    On several hosts, run the same command on each. On TPU pods and under SLURM the processes find one another;
    elsewhere give --coordinator, --processes and --process-id.
    """
    from arcflow_jax.parallel import xla_presets

    if xla_preset is not None:  # before JAX starts
        os.environ.update(xla_presets.variables(xla_preset, os.environ))
    from arcflow_jax.parallel.processes import is_main
    from arcflow_jax.storage import cache
    from arcflow_jax.training.loop import train as run
    from arcflow_jax.training.recipe import Recipe, read_config
    from arcflow_jax.training.report.dry_run import report

    recipe = Recipe.from_config(read_config(config, context.args))
    with hosts.connected():
        if dry_run:
            print(report(recipe))
            return
        cache.enable_compilation_cache()
        out = run(recipe, step=step, profile=profile)
        if is_main():
            print(f"the student is in {out}")


@options.expand_options
def embed_prompts(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="The recipe: NAME or FILE.py, and :VARIANT if it has some.")],
    out: Annotated[Path, path_option(help="The directory to write. It must not exist yet, or be empty.")],
    *,
    hosts: options.HostOptions,
) -> None:
    """Writes the text embeddings of a recipe's prompts, for training where the encoders do not fit.

    arcflow train then reads them, with the same recipe and --config.embeddings=OUT. Where the encoders fit, train
    without them: embeddings take 4.2 MB per prompt for FLUX.1, 7.9 MB for FLUX.2 [klein] 4B, 3.7 MB for Qwen-Image. An
    interrupted run resumes. Several hosts divide the prompts; run the same command on each, as for arcflow train.
    """
    from arcflow_jax.parallel.processes import is_main
    from arcflow_jax.storage import cache
    from arcflow_jax.training.embeddings import embed_prompts as embed
    from arcflow_jax.training.recipe import Recipe, read_config

    recipe = Recipe.from_config(read_config(config, context.args))
    with hosts.connected():
        cache.enable_compilation_cache()
        embed(recipe, out)
        if is_main():
            print(f"the embeddings are in {out}")
