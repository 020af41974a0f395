"""`arcflow evaluate` and its commands, as in `cli`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from arcflow_jax.cli import options as options
from arcflow_jax.errors import UserError

app = typer.Typer(help="How good a student's pictures are, and how close to its teacher's.", no_args_is_help=True)


class Metric(enum.StrEnum):
    fid = enum.auto()
    pfid = enum.auto()
    clip = enum.auto()


class Benchmark(enum.StrEnum):
    geneval = "geneval"
    dpg_bench = "dpg-bench"


@app.command("trajectory")
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
    model: options.Model = options.DEMO / "teacher",
    adapter: options.Adapter = None,
    raw: options.Raw = False,
    steps: Annotated[int | None, typer.Option(help="The student's network calls. By default as trained.")] = None,
    teacher_steps: Annotated[int, typer.Option(help="The dense teacher's Euler steps.")] = 50,
    seed: options.Seed = 0,
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
    norm_preserving: options.NormPreserving = False,
    height: options.Height = None,
    width: options.Width = None,
    batch_size: options.BatchSize = None,
    mesh: options.Mesh = "",
) -> None:
    """Follows student and teacher from the same noises, and tells where the student's error comes from.

    Endpoint error, and for each segment velocity and state errors over σ, split into what the student gets wrong from
    the teacher's own state (local), what it inherits from earlier segments (drift), and the closed form against
    quadrature. Leaves trajectory.json and trajectory.png in OUT. An evaluation that was interrupted goes on.
    """
    from arcflow_jax.data.prompts import read_prompts
    from arcflow_jax.evaluate.comparison import Comparison, ComparisonSettings
    from arcflow_jax.evaluate.trajectory_plot import check_library
    from arcflow_jax.evaluate.trajectory_report import evaluate

    check_library()  # not after hours
    found = read_prompts(prompts, prompts_field)
    if count is not None and not 1 <= count <= len(found.texts):
        raise UserError(f"count is {count}, but has to be from 1 to {len(found.texts)}, of which {prompts} has prompts")
    settings = ComparisonSettings(steps, teacher_steps, seed, guidance, negative_prompt, norm_preserving, height, width)
    adapter = options.which_student(model, adapter)
    comparison = Comparison(model, adapter, settings, batch_size, mesh, raw)
    evaluate(comparison, found.texts[:count], out)
    print(f"the figures and the plot are in {out}")


@app.command("metrics")
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
    norm_preserving: options.NormPreserving = False,
    batch_size: options.BatchSize = None,
    mesh: options.Mesh = "",
    offload: options.Offload = False,
) -> None:
    """FID, pFID and CLIP score of a folder of pictures, or straight of a student or teacher.

    Without a reference the pictures' statistics are gathered, to be one for others. An evaluation that was
    interrupted goes on. Needs PyTorch: pip install arcflow_jax[eval].
    """
    from arcflow_jax.data.prompts import read_prompts
    from arcflow_jax.evaluate.features import CLIP
    from arcflow_jax.evaluate.image_sets import Folder, Sampled
    from arcflow_jax.evaluate.metrics import REFERENCES, evaluate, table
    from arcflow_jax.evaluate.statistics import METRICS, Networks

    if (pictures is None) == (prompts is None):
        raise UserError("say what to judge: either --pictures, or what to sample with --prompts")
    if pictures is not None and (adapter is not None or teacher):
        raise UserError("--pictures are there already: leave --adapter and --teacher out, or name --prompts")
    references = {name: at for name, at in zip(REFERENCES, (real, teacher_pictures), strict=True) if at is not None}
    # Before the model, which takes longest to load
    networks = Networks(METRICS if metric is None else [each.value for each in metric], inception, clip or CLIP)
    with options.progress_bar() as progress:
        if pictures is not None:
            judged = Folder(pictures)
        else:
            from arcflow_jax.pipeline import ArcFlowPipeline

            adapter = options.which_student(model, adapter, raw, teacher)
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
                norm_preserving=norm_preserving,
            )
        report = evaluate(judged, references, out, networks, progress)
    print(table(report))
    print(f"the figures are in {out}")


@app.command("export")
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
    norm_preserving: options.NormPreserving = False,
    batch_size: options.BatchSize = None,
    mesh: options.Mesh = "",
    offload: options.Offload = False,
) -> None:
    """Makes the pictures of a benchmark, laid out as its own scorer reads them.

    An export that was interrupted goes on.
    """
    from arcflow_jax.evaluate.benchmarks import LAYOUTS
    from arcflow_jax.evaluate.benchmarks import export as make
    from arcflow_jax.pipeline import ArcFlowPipeline

    adapter = options.which_student(model, adapter, raw, teacher)
    items = LAYOUTS[benchmark].read(prompts)  # before the model, which takes longest to load
    with options.progress_bar() as progress:
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
            norm_preserving=norm_preserving,
        )
    print(f"{out} has {made} pictures")
