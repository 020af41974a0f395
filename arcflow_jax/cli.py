"""The command line, `arcflow`: each command parses, imports its worker, calls it and prints.

Workers are imported where they are called, so that `--help` does not wait for JAX.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from arcflow_jax import cli_evaluate
from arcflow_jax import cli_options as options
from arcflow_jax.errors import UserError, told_in_a_line

app = typer.Typer(
    help="ArcFlow in JAX: distils large text-to-image models into 2-step generators.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(cli_evaluate.app, name="evaluate")


@app.callback()
def arcflow() -> None:
    """Keeps the commands subcommands, even if there is only one."""


class Precision(enum.StrEnum):
    bfloat16 = enum.auto()
    float32 = enum.auto()


class ExportPrecision(enum.StrEnum):
    float16 = enum.auto()
    bfloat16 = enum.auto()
    float32 = enum.auto()


class Teacher(enum.StrEnum):
    tiny_flux = "tiny-flux"
    tiny_qwen = "tiny-qwen"


class Program(enum.StrEnum):
    sampler = "sampler"
    train = "train"
    train_steady = "train-steady"


@app.command()
def convert(
    out: Annotated[Path, typer.Option(help="The directory to write. It must not exist yet, or be empty.")],
    source: Annotated[
        str | None,
        typer.Option(
            help="The PyTorch model, FLUX.1 or Qwen-Image: a diffusers folder with model_index.json and the folders "
            "that it names (transformer/, text_encoder/, vae/, …), weights as safetensors; or a hub id, OWNER/NAME."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Of a hub id: branch, tag or commit. By default the main branch.")
    ] = None,
    transformer: Annotated[
        Path | None,
        typer.Option(
            help="A single file, such as flux1-dev.safetensors, with the transformer's weights, in the authors' layout "
            "or diffusers'. SOURCE then needs only transformer/config.json."
        ),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(help="The same for the autoencoder, such as ae.safetensors and vae/config.json.")
    ] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="Of the converted weights. By default each component keeps its own.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Instead of --source, a released student: a folder with config.json and "
            "diffusion_pytorch_model.safetensors, or that file; or a hub id, OWNER/NAME or OWNER/NAME/FOLDER. With "
            "--base."
        ),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The converted model that the released student was distilled from.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Network calls of the released student. By default what its file says, or 2.")
    ] = None,
    shift: Annotated[float | None, typer.Option(help="Its time shift. By default what its file says, or 3.2.")] = None,
    final_step_ratio: Annotated[
        float | None, typer.Option(help="Length of its last step. By default what its file says, or 1.0.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Its guidance scale. By default what its file says, or the published one.")
    ] = None,
) -> None:
    """Converts a PyTorch model to a model directory for training and sampling, or a released student to one
    that arcflow sample takes as --adapter.

    Every tensor is checked by name, shape and value; nothing is filled in or left out. OUT appears complete at the
    end, or not at all.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no arithmetic here: leave an accelerator, if any, to others
    sampling = {"steps": steps, "shift": shift, "final_step_ratio": final_step_ratio, "guidance": guidance}
    if adapter is not None:
        if base is None or any(value is not None for value in (source, transformer, vae, dtype)):
            raise UserError("a released student, --adapter, is converted with --base, and without a model's options")
        from arcflow_jax.adapter_formats import import_adapter

        print(f"converted {adapter} to {import_adapter(adapter, base, out, revision, **sampling)}")
        return
    if source is None:
        raise UserError("name the model to convert with --source, or a released student with --adapter")
    if base is not None or any(value is not None for value in sampling.values()):
        raise UserError("--base, --steps, --shift, --final-step-ratio and --guidance belong to --adapter")
    from arcflow_jax.conversion import convert_model

    files = {name: file for name, file in {"transformer": transformer, "vae": vae}.items() if file is not None}
    print(f"converted {source} to {convert_model(source, out, dtype and dtype.value, revision, files)}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="The recipe: FILE.py, or FILE.py:VARIANT.")],
    step: Annotated[
        int | None,
        typer.Option(help="Go on from this checkpoint instead of the newest. Newer ones are deleted."),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="A:B, write a JAX trace of iterations A to B, counted from 1, to OUT/profile."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only check everything, and print the recipe, sizes, memory and the mesh."),
    ] = False,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT on the first of several machines, where the others find it.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="How many machines run this command.")] = None,
    process_id: Annotated[int | None, typer.Option(help="Which of them this is, from 0.")] = None,
) -> None:
    """Distils a converted teacher into a few-step student.

    Any value of the recipe can be overridden: --config.steps=1000 --config.optimizer.learning_rate=1e-4. A run whose
    directory (--config.out) is there already goes on from its last checkpoint. SIGTERM makes it save and end with
    exit code 0.

    On several machines the same command runs on each. On TPU pods and under SLURM they find one another; elsewhere
    --coordinator, --processes and --process-id tell them.
    """
    from arcflow_jax.config import Recipe, read_config
    from arcflow_jax.distributed import initialize, is_main
    from arcflow_jax.dry_run import report
    from arcflow_jax.train import train as run

    recipe = Recipe.of(read_config(config, context.args))
    initialize(coordinator, processes, process_id)
    if dry_run:
        print(report(recipe))
        return
    out = run(recipe, step=step, profile=profile)
    if is_main():
        print(f"the student is in {out}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def embed_prompts(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="The recipe: FILE.py, or FILE.py:VARIANT.")],
    out: Annotated[Path, typer.Option(help="The directory to write. It must not exist yet, or be empty.")],
) -> None:
    """Writes the text embeddings of a recipe's prompts, for training where the encoders do not fit.

    arcflow train then reads them, with the same recipe and --config.embeddings=OUT. Where the encoders fit, training
    without costs less: embeddings take 4.2 MB a prompt for FLUX.1, 3.7 MB for Qwen-Image. Embedding that was
    interrupted goes on.
    """
    from arcflow_jax.config import Recipe, read_config
    from arcflow_jax.embeddings import embed_prompts as embed

    print(f"the embeddings are in {embed(Recipe.of(read_config(config, context.args)), out)}")


@app.command()
def sample(
    prompt: Annotated[
        list[str] | None, typer.Option(help="What the picture should show. May be given several times.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(help="A .txt file of prompts, one a line, or a .jsonl or .parquet file with a field `prompt`."),
    ] = None,
    model: options.Model = options.DEMO / "teacher",
    adapter: options.Adapter = None,
    raw: options.Raw = False,
    teacher: options.Teacher = False,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    guidance: options.Guidance = None,
    height: options.Height = None,
    width: options.Width = None,
    final_step_ratio: options.FinalStepRatio = None,
    negative_prompt: options.NegativePrompt = None,
    rescaled: options.Rescaled = False,
    images: Annotated[int, typer.Option(help="Pictures a prompt, each from noise of its own.")] = 1,
    batch_size: options.BatchSize = None,
    latents: Annotated[
        Path | None,
        typer.Option(
            help="Noise to start from, a .safetensors or .npy file with one array: packed [pictures, tokens, 64] or, "
            "as PyTorch has it, [pictures, 16, height/8, width/8]."
        ),
    ] = None,
    mesh: options.Mesh = "",
    offload: options.Offload = False,
    grid: Annotated[bool, typer.Option("--grid", help="Write grid.png as well, all pictures on one sheet.")] = False,
    out: Annotated[Path, typer.Option(help="Directory for the pictures.")] = Path("pictures"),
) -> None:
    """Makes pictures from prompts, one PNG each, with the settings in its metadata."""
    from arcflow_jax.images import contact_sheet, file_name, make_folder, read_latents, save_picture
    from arcflow_jax.pipeline import ArcFlowPipeline
    from arcflow_jax.prompt_sources import read_prompts
    from arcflow_jax.prompts import check_prompts

    adapter = options.which_student(model, adapter, raw, teacher)
    if (prompt is None) == (prompts_file is None):
        raise UserError("say what the pictures should show: either with --prompt or with --prompts-file")
    prompts = prompt or read_prompts(prompts_file).texts
    check_prompts(prompts)
    noise = None if latents is None else read_latents(latents)

    with options.progress_bar() as progress:
        pipeline = ArcFlowPipeline.from_pretrained(model, adapter, mesh=mesh, offload=offload, raw=raw)
        pictures = pipeline.stream(
            prompts,
            steps=steps,
            seed=seed,
            guidance=guidance,
            height=height,
            width=width,
            final_step_ratio=final_step_ratio,
            negative_prompt=negative_prompt,
            rescaled=rescaled,
            images_per_prompt=images,
            batch_size=batch_size,
            latents=noise,
            progress=lambda activity, done: progress(activity, done, len(prompts) * images),
        )
        make_folder(out)
        for_grid = []
        for picture in pictures:
            if latents is not None:
                picture.info["latents"] = latents
            save_picture(picture, path := out / file_name(picture))
            print(path)
            if grid:
                for_grid.append(picture)
        if grid:
            sheet = contact_sheet(for_grid, columns=images if images > 1 else None)
            save_picture(sheet, path := out / "grid.png")
            print(path)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def compile_report(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="The recipe: FILE.py, or FILE.py:VARIANT.")],
    topology: Annotated[
        list[str],
        typer.Option(help="E.g. v5p:1x1x1, v6e:2x4, v6e:2x4*2 for two such slices. May be given several times."),
    ],
    mesh: Annotated[
        list[str],
        typer.Option(help="E.g. tensor=4,sequence=2; one -1 takes the rest. May be given several times."),
    ] = ["tensor=-1"],  # noqa: B006
    program: Annotated[
        Program,
        typer.Option(help="The few-step sampler, or an iteration of distillation: while the teacher leads, or after."),
    ] = Program.sampler,
    batch: Annotated[int, typer.Option(help="Pictures, on all devices together.")] = 1,
    height: Annotated[
        int | None, typer.Option(help="In pixels, with --width. By default the recipe's largest resolution.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, with --height.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds that one compilation may take.")] = 1800,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Compiles a program for TPUs that are not there, and prints memory, work and communication.

    Needs no weights: the recipe's model may also be a diffusers folder of config files alone, as in
    --config.model=configs/flux.1-dev, or configs/qwen-image.
    """
    from arcflow_jax.compile_report.report import Case, report
    from arcflow_jax.sharding import mesh_sizes

    if (height is None) != (width is None):
        raise UserError("--height and --width go together")
    overrides = [*context.args, *([] if height is None else [f"--config.resolutions=(({height}, {width}),)"])]
    cases = [
        Case(program.value, config, tuple(overrides), name, mesh_sizes(grid), batch)
        for name in topology
        for grid in mesh
    ]
    report(cases, limit, out)


@app.command()
def export(
    adapter: Annotated[Path, typer.Option(help="What arcflow train wrote.")],
    out: Annotated[Path, typer.Option(help="The directory to write. It must not exist yet, or be empty.")],
    raw: Annotated[
        bool, typer.Option("--raw", help="The last iteration's weights instead of the averaged ones.")
    ] = False,
    dtype: Annotated[ExportPrecision, typer.Option(help="Of the exported tensors.")] = ExportPrecision.float16,
) -> None:
    """Writes a student as the ArcFlow authors release theirs: config.json and safetensors for their PyTorch loader,
    diffusers and PEFT.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no arithmetic here: leave an accelerator, if any, to others
    from arcflow_jax.adapter_formats import export_adapter

    print(f"exported {adapter} to {export_adapter(adapter, out, raw=raw, dtype=dtype.value)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for everything that the demo makes.")] = options.DEMO,
    teacher: Annotated[
        Teacher, typer.Option(help="The bundled teacher, a FLUX.1 or a Qwen-Image.")
    ] = Teacher.tiny_flux,
) -> None:
    """Converts a bundled teacher, distils it, and compares 2 steps with 50, in about ten minutes on two cores.

    Leaves index.html, grid.png and metrics.json in OUT, and a student that arcflow sample uses. A demo that was
    interrupted goes on.
    """
    from arcflow_jax.demo.run import demo as run

    run(out, teacher.value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: with 0, with 2 and one line on stderr for what a user can put right."""
    with told_in_a_line():
        app(arguments)
