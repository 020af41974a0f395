"""`arcflow sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arcflow_jax.cli import options
from arcflow_jax.cli.options import path_option
from arcflow_jax.errors import UserError


@options.expand_options
def sample(
    prompt: Annotated[
        list[str] | None, typer.Option(help="What the image should show. May be given several times.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        path_option(help="A .txt file of prompts, one a line, or a .jsonl or .parquet file with a field `prompt`."),
    ] = None,
    images: Annotated[int, typer.Option(help="Number of images per prompt, each from noise of its own.")] = 1,
    latents: Annotated[
        Path | None,
        path_option(
            help="Noise to start from instead of the seed's: a .safetensors or .npy file with one array, packed "
            "[images, tokens, 64] or, as in PyTorch, [images, 16, height/8, width/8]."
        ),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also write grid.png, all images on one sheet.")] = False,
    out: Annotated[Path, path_option(help="Directory for the images.")] = Path("images"),
    *,
    sampling: options.SamplingOptions,
) -> None:
    """Makes images from prompts: one PNG each, with its settings in the metadata."""
    from arcflow_jax.data.output import contact_sheet, file_name, read_latents, save_image, unused
    from arcflow_jax.data.prompts import check_prompts, read_prompts
    from arcflow_jax.storage.atomic import make_directory

    if prompt is not None and prompts_file is None:
        prompts = prompt
    elif prompts_file is not None and prompt is None:
        prompts = read_prompts(prompts_file).texts
    else:
        raise UserError("say what the images should show: either with --prompt or with --prompts-file")
    check_prompts(prompts)
    noise = None if latents is None else read_latents(latents)
    pipeline = sampling.load()

    with options.progress_bar() as progress:
        stream = pipeline.stream(
            prompts,
            num_images_per_prompt=images,
            latents=noise,
            batch_size=sampling.batch_size,
            progress=lambda activity, done: progress(activity, done, len(prompts) * images),
            **sampling.settings(),
        )
        make_directory(out)
        for_grid = []
        for image in stream:
            if latents is not None:
                image.info["latents"] = latents
            save_image(image, path := unused(out / file_name(image)))
            print(path)
            if grid:
                for_grid.append(image)
        if grid:
            sheet = contact_sheet(for_grid, columns=images if images > 1 else None)
            save_image(sheet, path := unused(out / "grid.png"))
            print(path)
