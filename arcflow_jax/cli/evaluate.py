"""`arcflow evaluate` and its commands."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Annotated

import typer

from arcflow_jax.cli import options
from arcflow_jax.cli.options import path_option
from arcflow_jax.errors import UserError

app = typer.Typer(help="How good a student's images are, and how close to the teacher's.", no_args_is_help=True)


class Metric(enum.StrEnum):
    fid = enum.auto()
    pfid = enum.auto()
    clip = enum.auto()
    retrieval = enum.auto()
    hps = enum.auto()
    diversity = enum.auto()


class Benchmark(enum.StrEnum):
    geneval = "geneval"
    dpg_bench = "dpg-bench"


@app.command("trajectory")
@options.expand_options
def evaluate_trajectory(
    prompts: Annotated[
        str,
        typer.Option(
            help="A .txt file of prompts, one per line, a .jsonl or .parquet file, a folder of such files, or the hub "
            "id of a data set, OWNER/NAME or OWNER/NAME:SPLIT."
        ),
    ],
    out: Annotated[Path, path_option(help="Directory for the figures and the plot.")],
    prompts_field: Annotated[str, typer.Option(help="The field or column that has the prompt.")] = "prompt",
    count: Annotated[int | None, typer.Option(help="Use only the first COUNT prompts.")] = None,
    steps: Annotated[int | None, typer.Option(help="The student's NFE. By default as trained.")] = None,
    teacher_steps: Annotated[int, typer.Option(help="Euler steps of the dense teacher.")] = 50,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale. By default what the student was trained at.")
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            help="Negative prompt for classifier-free guidance (CFG) of the teacher, by default of scale 4. A student "
            'of Qwen-Image that does not name one itself, a released one, needs "".'
        ),
    ] = None,
    *,
    student: options.StudentOptions,
    hosts: options.HostOptions,
) -> None:
    """Compares student and teacher along trajectories from the same noise, and shows where the error arises.

    Endpoint error; and for each segment the velocity and state errors over the noise level, split into the error from
    the teacher's own state (local), the error inherited from earlier segments (drift), and the closed form against
    quadrature. Leaves trajectory.json and trajectory.png in OUT. An interrupted evaluation resumes. Several hosts
    divide the prompts; run the same command on each, as for arcflow train.
    """
    from arcflow_jax.data.prompts import read_prompts
    from arcflow_jax.evaluate.trajectory.comparison import Comparison, ComparisonSettings
    from arcflow_jax.evaluate.trajectory.plot import check_library
    from arcflow_jax.evaluate.trajectory.report import evaluate
    from arcflow_jax.models.model_cache import converted
    from arcflow_jax.parallel.processes import is_main
    from arcflow_jax.storage import cache

    check_library()  # not after hours
    settings = ComparisonSettings(
        steps,
        teacher_steps,
        student.seed,
        guidance,
        negative_prompt,
        student.norm_preserving,
        student.height,
        student.width,
    )
    with hosts.connected():
        found = read_prompts(prompts, prompts_field).first(count).texts
        adapter = student.student()
        cache.enable_compilation_cache()
        model = converted(student.model)
        comparison = Comparison(model, adapter, settings, student.batch_size, student.mesh, student.raw)
        evaluate(comparison, found, out)
        if is_main():
            print(f"the figures and the plot are in {out}")


@app.command("metrics")
@options.expand_options
def evaluate_metrics(
    out: Annotated[Path, path_option(help="JSON file for the figures; the images' statistics lie beside it.")],
    images: Annotated[
        Path | None,
        path_option(
            help="A folder of images to judge. The CLIP score needs their prompts: in the metadata of PNGs, where "
            "arcflow sample writes them, in .txt files beside the images, or in metadata.jsonl."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Instead of --images: sample images for each of these prompts. A .txt, .jsonl or .parquet "
            "file, a folder of them, a data set's hub id OWNER/NAME or OWNER/NAME:SPLIT, hpsv2 or coco-10k."
        ),
    ] = None,
    prompts_field: Annotated[str, typer.Option(help="The field or column that has the prompt.")] = "prompt",
    count: Annotated[int | None, typer.Option(help="Use only the first COUNT prompts.")] = None,
    images_per_prompt: Annotated[
        int | None,
        typer.Option(help="Images to sample for each prompt. By default 1, and 16 if diversity is among the metrics."),
    ] = None,
    real: Annotated[
        Path | None,
        path_option(help="A reference of FID and pFID: a folder of real images, or their statistics, a .npz file."),
    ] = None,
    teacher_images: Annotated[
        Path | None,
        path_option(
            help="A second reference, images of the teacher or their statistics, with figures of its own. Diversity "
            "compares with it, too."
        ),
    ] = None,
    metric: Annotated[
        list[Metric] | None, typer.Option(help="May be given several times. By default fid, pfid and clip.")
    ] = None,
    inception: Annotated[
        Path | None,
        path_option(help="inception-2015-12-05.pt, the network of FID. By default downloaded once from its authors."),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="A CLIP model in transformers' format, a folder or hub id, for the CLIP score and retrieval. By "
            "default openai/clip-vit-large-patch14-336."
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="A DINOv2 or CLIP model in transformers' format, a folder or hub id, for diversity. By default "
            "facebook/dinov2-base."
        ),
    ] = None,
    hps: Annotated[
        str | None,
        typer.Option(help="The CLIP model of HPSv2 or HPSv2.1 in transformers' format, a folder or hub id."),
    ] = None,
    *,
    sampling: options.SamplingOptions,
    hosts: options.HostOptions,
) -> None:
    """FID, pFID, CLIP score, retrieval, HPS and diversity of a folder of images, or of a student or teacher directly.

    Without a reference, only the images' statistics are computed, for use as a reference later. An interrupted
    evaluation resumes. Several hosts divide the images; run the same command on each, as for arcflow train. Needs
    PyTorch: pip install arcflow_jax[eval].
    """
    from arcflow_jax.data.prompts import read_prompts
    from arcflow_jax.evaluate.features import CLIP, DINO
    from arcflow_jax.evaluate.image_sets import Folder, Sampled
    from arcflow_jax.evaluate.measures import DEFAULT, Networks
    from arcflow_jax.evaluate.metrics import REFERENCES, evaluate, table
    from arcflow_jax.parallel.processes import is_main

    if (images is None) == (prompts is None):
        raise UserError("say what to judge: either --images, or what to sample with --prompts")
    if images is not None:
        given = {"count": count, "images_per_prompt": images_per_prompt}
        of_sampling = {each.name: (getattr(sampling, each.name), each.default) for each in dataclasses.fields(sampling)}
        given |= {name: value for name, (value, default) in of_sampling.items() if value != default}
        if names := [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]:
            raise UserError(f"--images are there already: leave {', '.join(names)} out, or name --prompts")
    metrics = DEFAULT if metric is None else [each.value for each in metric]
    if hps is not None and "hps" not in metrics:
        raise UserError("--hps is the network of the metric hps: add --metric hps, or leave --hps out")
    diverse = "diversity" in metrics
    if diverse and images_per_prompt == 1:
        raise UserError("diversity needs at least two images of each prompt: leave --images-per-prompt out for 16")
    references = {name: at for name, at in zip(REFERENCES, (real, teacher_images), strict=True) if at is not None}
    judged: Folder | Sampled
    with hosts.connected():
        # Before the model, which takes longest to load
        networks = Networks(metrics, inception, clip or CLIP, features or DINO, hps)
        if prompts is None:
            assert images is not None
            judged = Folder(images, by_prompt=diverse)
        else:
            found = read_prompts(prompts, prompts_field).first(count)
            each = images_per_prompt or (16 if diverse else 1)
            judged = Sampled(sampling.load(), found, sampling.batch_size, each, **sampling.settings())
        with options.progress_bar() as progress:
            report = evaluate(judged, references, out, networks, progress)
        if is_main():
            print(table(report))
            print(f"the figures are in {out}")


@app.command("export")
@options.expand_options
def evaluate_export(
    benchmark: Annotated[Benchmark, typer.Option(help="The benchmark whose scorer reads the images.")],
    prompts: Annotated[
        Path,
        path_option(
            help="The benchmark's prompts as published: GenEval's evaluation_metadata.jsonl, or DPG-Bench's folder of "
            ".txt files."
        ),
    ],
    out: Annotated[Path, path_option(help="Directory for the images, which the scorer reads.")],
    images: Annotated[int, typer.Option(help="Number of images per prompt. DPG-Bench takes 4.")] = 4,
    *,
    sampling: options.SamplingOptions,
    hosts: options.HostOptions,
) -> None:
    """Makes the images of a benchmark, laid out as its own scorer reads them. An interrupted export resumes.

    Several hosts divide the prompts; run the same command on each, as for arcflow train.
    """
    from arcflow_jax.evaluate.benchmarks import LAYOUTS
    from arcflow_jax.evaluate.benchmarks import export as make
    from arcflow_jax.parallel.processes import is_main

    sampling.adapter_or_teacher()  # before anything is read
    with hosts.connected():
        items = LAYOUTS[benchmark].read(prompts)  # before the model, which takes longest to load
        pipeline = sampling.load()
        with options.progress_bar() as progress:
            settings = sampling.settings()
            made = make(pipeline, benchmark.value, items, out, images, sampling.batch_size, progress, **settings)
        if is_main():
            print(f"{out} has {made} images")
