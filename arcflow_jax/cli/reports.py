"""`arcflow compile-report` and `arcflow demo`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from arcflow_jax.cli import options
from arcflow_jax.cli.options import path_option
from arcflow_jax.errors import UserError


class Teacher(enum.StrEnum):
    tiny_emoji = "tiny-emoji"
    tiny_flux = "tiny-flux"
    tiny_flux2 = "tiny-flux2"
    tiny_qwen = "tiny-qwen"


class KernelFormat(enum.StrEnum):
    int8 = enum.auto()
    fp8 = enum.auto()
    int4 = enum.auto()


class Blocks(enum.StrEnum):
    blocks = enum.auto()


class Program(enum.StrEnum):
    text_encoder = "text-encoder"
    vae_decoder = "vae-decoder"
    sampler = "sampler"
    train = "train"
    train_steady = "train-steady"


def compile_report(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="The recipe: NAME or FILE.py, and :VARIANT if it has some.")],
    topology: Annotated[
        list[str],
        typer.Option(
            help="TPU topology, e.g. v5p:1x1x1, or v6e:2x4*2 for two slices; or GPUs: h100, h100:8, …. May be given "
            "several times."
        ),
    ],
    mesh: Annotated[
        list[str],
        typer.Option(help="Mesh, e.g. tensor=4,sequence=2; a size of -1 takes the rest. May be given several times."),
    ] = ["tensor=-1"],  # noqa: B006
    program: Annotated[
        Program,
        typer.Option(
            help="The largest text encoder, the few-step sampler, the VAE's decoder, or a training step: the first "
            "ones (train), or later ones (train-steady)."
        ),
    ] = Program.sampler,
    batch: Annotated[int, typer.Option(help="Batch size, of all devices together.")] = 1,
    height: Annotated[
        int | None, typer.Option(help="Height in pixels, with --width. By default the recipe's largest resolution.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels, with --height.")] = None,
    quantize: Annotated[
        KernelFormat | None, typer.Option(help="Format of the kernels, of a model that is not converted.")
    ] = None,
    offload: Annotated[
        Blocks | None, typer.Option(help="Keep the blocks in host memory, as arcflow sample --offload blocks does.")
    ] = None,
    limit: Annotated[float, typer.Option(help="Time limit of one compilation, in seconds.")] = 1800,
    out: Annotated[Path | None, path_option(help="JSON file for the figures.")] = None,
) -> None:
    """Compiles a program for TPUs or GPUs that this machine does not have, and prints memory, work and communication.

    Needs no weights: the recipe's model may be a diffusers folder with config files only, as in
    --config.model=configs/flux.1-dev, or configs/qwen-image.
    """
    from arcflow_jax.compile_report.report import Case, report
    from arcflow_jax.parallel.mesh import mesh_sizes

    if (height is None) != (width is None):
        raise UserError("--height and --width go together")
    overrides = [*context.args, *([] if height is None else [f"--config.resolutions=(({height}, {width}),)"])]
    weights = (None if quantize is None else quantize.value, None if offload is None else offload.value)
    cases = [
        Case(program.value, config, tuple(overrides), name, mesh_sizes(grid), batch, *weights)
        for name in topology
        for grid in mesh
    ]
    report(cases, limit, out)


def demo(
    out: Annotated[Path, path_option(help="Directory for the demo's model, students and report.")] = options.DEMO,
    teacher: Annotated[
        Teacher, typer.Option(help="The bundled teacher: a FLUX.1 of emoji, a FLUX.1 or a Qwen-Image of shapes.")
    ] = Teacher.tiny_emoji,
    quantize: Annotated[KernelFormat | None, typer.Option(help="Format of the teacher's kernels.")] = None,
) -> None:
    """Converts a bundled teacher, distils it, and compares 2 steps with 50, in a few minutes on two cores.

    Leaves index.html, grid.png and metrics.json in OUT, and a student that arcflow sample uses. An interrupted demo
    resumes.
    """
    from arcflow_jax.demo.run import demo as run
    from arcflow_jax.storage import cache

    cache.enable_compilation_cache()
    run(out, teacher.value, None if quantize is None else quantize.value)
