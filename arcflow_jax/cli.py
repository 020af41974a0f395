"""The command line, `arcflow`: each command parses, imports its worker, calls it and prints.

Workers are imported where they are called, so that `--help` does not wait for JAX.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from arcflow_jax.errors import Preempted, UserError

app = typer.Typer(
    help="ArcFlow in JAX: distils large text-to-image models into 2-step generators.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

DEMO = Path("runs/demo")


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


class Program(enum.StrEnum):
    sampler = "sampler"
    train = "train"
    train_steady = "train-steady"


class Metric(enum.StrEnum):
    fid = enum.auto()
    pfid = enum.auto()
    clip = enum.auto()


class Benchmark(enum.StrEnum):
    geneval = "geneval"
    dpg_bench = "dpg-bench"


# What the commands that make pictures share
Model = Annotated[Path, typer.Option(help="What arcflow convert wrote. By default what arcflow demo left.")]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="What arcflow train wrote, or a released student; also a hub id, OWNER/NAME or OWNER/NAME/FOLDER. By "
        "default, with the demo's model, its student."
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="The last iteration's weights instead of the averaged ones.")]
Teacher = Annotated[bool, typer.Option("--teacher", help="Sample from the teacher itself.")]
Steps = Annotated[int | None, typer.Option(help="Network calls. By default the student's own, for the teacher 50.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale. By default the one that the student was trained at, or 3.5.")
]
Height = Annotated[int | None, typer.Option(help="In pixels. By default the model's own.")]
Width = Annotated[int | None, typer.Option(help="In pixels. By default the model's own.")]
FinalStepRatio = Annotated[
    float | None, typer.Option(help="Length of the last step relative to the others. By default as trained.")
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        help='With --teacher: what to guide away from, or "" as Qwen-Image has it. Guidance is then true '
        "classifier-free guidance, by default 4."
    ),
]
Rescaled = Annotated[
    bool, typer.Option("--rescaled", help="True guidance as diffusers has it for Qwen-Image, which keeps norms.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Pictures made at a time. By default 1 for each part that --mesh splits them into."),
]
Mesh = Annotated[
    str,
    typer.Option(
        help="Several devices, e.g. tensor=4 or tensor=2,sequence=4: data splits the batch, fsdp batch and "
        "weights, tensor attention heads and MLPs, sequence image tokens."
    ),
]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="Keep in host memory what is not running: encoders, transformer or decoder."),
]


def which_student(model: Path, adapter: str | None, raw: bool, teacher: bool) -> str | None:
    """The student to sample from, by default the demo's; None for the teacher. Raises UserError if none is named."""
    if teacher and (adapter is not None or raw):
        superfluous = "--adapter" if adapter is not None else "--raw"
        raise UserError(f"--teacher samples without a student: leave {superfluous} out")
    if teacher or adapter is not None:
        return adapter
    if model != DEMO / "teacher":
        raise UserError("name the student with --adapter, or say --teacher for the teacher itself")
    return str(DEMO / "arcflow")


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, if that is a terminal: told what is going on, how many pictures are done, and of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    # stdout has the paths, which scroll by above the bar where they share one
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=not console.is_interactive,
    ) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda activity, done, total: bar.update(task, description=activity, completed=done, total=total)


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
    model: Model = DEMO / "teacher",
    adapter: Adapter = None,
    raw: Raw = False,
    teacher: Teacher = False,
    steps: Steps = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    final_step_ratio: FinalStepRatio = None,
    negative_prompt: NegativePrompt = None,
    rescaled: Rescaled = False,
    images: Annotated[int, typer.Option(help="Pictures a prompt, each from noise of its own.")] = 1,
    batch_size: BatchSize = None,
    latents: Annotated[
        Path | None,
        typer.Option(
            help="Noise to start from, a .safetensors or .npy file with one array: packed [pictures, tokens, 64] or, "
            "as PyTorch has it, [pictures, 16, height/8, width/8]."
        ),
    ] = None,
    mesh: Mesh = "",
    offload: Offload = False,
    grid: Annotated[bool, typer.Option("--grid", help="Write grid.png as well, all pictures on one sheet.")] = False,
    out: Annotated[Path, typer.Option(help="Directory for the pictures.")] = Path("pictures"),
) -> None:
    """Makes pictures from prompts, one PNG each, with the settings in its metadata."""
    from arcflow_jax.images import contact_sheet, file_name, make_folder, read_latents, save_picture
    from arcflow_jax.pipeline import ArcFlowPipeline
    from arcflow_jax.prompt_sources import read_prompts
    from arcflow_jax.prompts import check_prompts

    adapter = which_student(model, adapter, raw, teacher)
    if (prompt is None) == (prompts_file is None):
        raise UserError("say what the pictures should show: either with --prompt or with --prompts-file")
    prompts = prompt or read_prompts(prompts_file).texts
    check_prompts(prompts)
    noise = None if latents is None else read_latents(latents)

    with progress_bar() as progress:
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


evaluate_app = typer.Typer(
    help="How good a student's pictures are, and how close to its teacher's.", no_args_is_help=True
)
app.add_typer(evaluate_app, name="evaluate")


@evaluate_app.command("trajectory")
def evaluate_trajectory(
    prompts: Annotated[
        str,
        typer.Option(
            help="A .txt file of prompts, one a line, a .jsonl or .parquet file, a folder of such files, or the hub id "
            "of a data set, OWNER/NAME or OWNER/NAME:SPLIT."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory for the figures and the plot.")],
    prompts_field: Annotated[str, typer.Option(help="The field, or column, that has the prompt.")] = "prompt",
    count: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    model: Model = DEMO / "teacher",
    adapter: Adapter = str(DEMO / "arcflow"),
    raw: Raw = False,
    steps: Annotated[int | None, typer.Option(help="The student's network calls. By default as trained.")] = None,
    teacher_steps: Annotated[int, typer.Option(help="The dense teacher's Euler steps.")] = 50,
    seed: Seed = 0,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale. By default the one that the student was trained at.")
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            help="What true classifier-free guidance of the teacher leads away from, by default of scale 4. A student "
            'of Qwen-Image that does not say so itself, a released one, needs "".'
        ),
    ] = None,
    rescaled: Rescaled = False,
    height: Height = None,
    width: Width = None,
    batch_size: BatchSize = None,
    mesh: Mesh = "",
) -> None:
    """Follows student and teacher from the same noises, and tells where the student's error comes from.

    Endpoint error, and for each segment velocity and state errors over σ, split into what the student gets wrong from
    the teacher's own state (local), what it inherits from earlier segments (drift), and the closed form against
    quadrature. Leaves trajectory.json and trajectory.png in OUT. An evaluation that was interrupted goes on.
    """
    from arcflow_jax.evaluate.comparison import Comparison, Settings
    from arcflow_jax.evaluate.trajectory_plot import check_library
    from arcflow_jax.evaluate.trajectory_report import evaluate
    from arcflow_jax.prompt_sources import read_prompts

    check_library()  # not after hours
    found = read_prompts(prompts, prompts_field)
    if count is not None and not 1 <= count <= len(found.texts):
        raise UserError(f"count is {count}, but has to be from 1 to {len(found.texts)}, of which {prompts} has prompts")
    settings = Settings(steps, teacher_steps, seed, guidance, negative_prompt, rescaled, height, width)
    comparison = Comparison(model, adapter, settings, batch_size, mesh, raw)
    evaluate(comparison, found.texts[:count], out)
    print(f"the figures and the plot are in {out}")


@evaluate_app.command("metrics")
def evaluate_metrics(
    out: Annotated[Path, typer.Option(help="JSON file for the figures; the pictures' statistics lie beside it.")],
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="A folder of pictures to judge. For the CLIP score with their prompts, as arcflow sample writes them "
            "into its PNGs, or captions in .txt files beside them or in metadata.jsonl."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Instead of --pictures: sample one picture for each of these prompts. A .txt, .jsonl or .parquet "
            "file, a folder of them, a data set's hub id OWNER/NAME or OWNER/NAME:SPLIT, hpsv2 or coco-10k."
        ),
    ] = None,
    prompts_field: Annotated[str, typer.Option(help="The field or column that has the prompt.")] = "prompt",
    real: Annotated[
        Path | None,
        typer.Option(help="What FID and pFID compare with: a folder of real pictures, or statistics, a .npz file."),
    ] = None,
    teacher_pictures: Annotated[
        Path | None, typer.Option(help="The same of the teacher's pictures, which gives figures of their own.")
    ] = None,
    metric: Annotated[
        list[Metric] | None, typer.Option(help="May be given several times. By default all three.")
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(help="inception-2015-12-05.pt, the network of FID. By default fetched from its authors, once."),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="CLIP as transformers has it, a folder or hub id. By default openai/clip-vit-large-patch14-336."
        ),
    ] = None,
    model: Model = DEMO / "teacher",
    adapter: Adapter = None,
    raw: Raw = False,
    teacher: Teacher = False,
    steps: Steps = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    final_step_ratio: FinalStepRatio = None,
    negative_prompt: NegativePrompt = None,
    rescaled: Rescaled = False,
    batch_size: BatchSize = None,
    mesh: Mesh = "",
    offload: Offload = False,
) -> None:
    """FID, pFID and CLIP score of a folder of pictures, or straight of a student or teacher.

    Without a reference the pictures' statistics are gathered, to be one for others. An evaluation that was
    interrupted goes on. Needs PyTorch: pip install arcflow_jax[eval].
    """
    from arcflow_jax.evaluate.features import CLIP
    from arcflow_jax.evaluate.metrics import REFERENCES, evaluate, table
    from arcflow_jax.evaluate.picture_sets import Folder, Sampled
    from arcflow_jax.evaluate.statistics import METRICS, Networks
    from arcflow_jax.prompt_sources import read_prompts

    if (pictures is None) == (prompts is None):
        raise UserError("say what to judge: either --pictures, or what to sample with --prompts")
    if pictures is not None and (adapter is not None or teacher):
        raise UserError("--pictures are there already: leave --adapter and --teacher out, or name --prompts")
    references = {name: at for name, at in zip(REFERENCES, (real, teacher_pictures), strict=True) if at is not None}
    # Before the model, which takes longest to load
    networks = Networks(METRICS if metric is None else [each.value for each in metric], inception, clip or CLIP)
    with progress_bar() as progress:
        if pictures is not None:
            judged = Folder(pictures)
        else:
            from arcflow_jax.pipeline import ArcFlowPipeline

            adapter = which_student(model, adapter, raw, teacher)
            found = read_prompts(prompts, prompts_field)
            judged = Sampled(
                ArcFlowPipeline.from_pretrained(model, adapter, mesh=mesh, offload=offload, raw=raw),
                found,
                batch_size=batch_size,
                steps=steps,
                seed=seed,
                guidance=guidance,
                height=height,
                width=width,
                final_step_ratio=final_step_ratio,
                negative_prompt=negative_prompt,
                rescaled=rescaled,
            )
        report = evaluate(judged, references, out, networks, progress)
    print(table(report))
    print(f"the figures are in {out}")


@evaluate_app.command("export")
def evaluate_export(
    benchmark: Annotated[Benchmark, typer.Option(help="Whose scorer the pictures are for.")],
    prompts: Annotated[
        Path,
        typer.Option(
            help="As the benchmark publishes them: GenEval's evaluation_metadata.jsonl, or DPG-Bench's folder of .txt "
            "files."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory for the pictures, which the scorer reads.")],
    images: Annotated[int, typer.Option(help="Pictures a prompt. DPG-Bench takes 4.")] = 4,
    model: Model = DEMO / "teacher",
    adapter: Adapter = None,
    raw: Raw = False,
    teacher: Teacher = False,
    steps: Steps = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    final_step_ratio: FinalStepRatio = None,
    negative_prompt: NegativePrompt = None,
    rescaled: Rescaled = False,
    batch_size: BatchSize = None,
    mesh: Mesh = "",
    offload: Offload = False,
) -> None:
    """Makes the pictures of a benchmark, laid out as its own scorer reads them.

    An export that was interrupted goes on.
    """
    from arcflow_jax.evaluate.benchmarks import LAYOUTS
    from arcflow_jax.evaluate.benchmarks import export as make
    from arcflow_jax.pipeline import ArcFlowPipeline

    adapter = which_student(model, adapter, raw, teacher)
    items = LAYOUTS[benchmark].read(prompts)  # before the model, which takes longest to load
    with progress_bar() as progress:
        made = make(
            ArcFlowPipeline.from_pretrained(model, adapter, mesh=mesh, offload=offload, raw=raw),
            benchmark.value,
            items,
            out,
            images,
            batch_size,
            progress,
            steps=steps,
            seed=seed,
            guidance=guidance,
            height=height,
            width=width,
            final_step_ratio=final_step_ratio,
            negative_prompt=negative_prompt,
            rescaled=rescaled,
        )
    print(f"{out} has {made} pictures")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for everything that the demo makes.")] = DEMO,
) -> None:
    """Converts the bundled teacher, distils it, and compares 2 steps with 50, in under ten minutes on two cores.

    Leaves index.html, grid.png and metrics.json in OUT, and a student that arcflow sample uses. A demo that was
    interrupted goes on.
    """
    from arcflow_jax.demo.run import demo as run

    run(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: with 0, with 2 and one line on stderr for what a user can put right."""
    try:
        app(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Preempted as told:
        print(told)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
