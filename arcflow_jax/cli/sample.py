"""`arcflow sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arcflow_jax.cli import options
from arcflow_jax.errors import UserError


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
    norm_preserving: options.NormPreserving = False,
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
    from arcflow_jax.data.output import contact_sheet, file_name, read_latents, save_image, unused
    from arcflow_jax.data.prompts import check_prompts, read_prompts
    from arcflow_jax.pipeline import ArcFlowPipeline
    from arcflow_jax.storage.atomic import make_directory

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
            norm_preserving=norm_preserving,
            images_per_prompt=images,
            batch_size=batch_size,
            latents=noise,
            progress=lambda activity, done: progress(activity, done, len(prompts) * images),
        )
        make_directory(out)
        for_grid = []
        for picture in pictures:
            if latents is not None:
                picture.info["latents"] = latents
            save_image(picture, path := unused(out / file_name(picture)))
            print(path)
            if grid:
                for_grid.append(picture)
        if grid:
            sheet = contact_sheet(for_grid, columns=images if images > 1 else None)
            save_image(sheet, path := unused(out / "grid.png"))
            print(path)
