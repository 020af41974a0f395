"""`arcflow sample`."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Annotated, Any

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
        path_option(help="A .txt file of prompts, one per line, or a .jsonl or .parquet file with a field `prompt`."),
    ] = None,
    images: Annotated[int, typer.Option(help="Number of images per prompt, each from noise of its own.")] = 1,
    latents: Annotated[
        Path | None,
        path_option(
            help="Noise to start from instead of the seed's: a .safetensors or .npy file with one array, packed "
            "[images, tokens, 64] or, as in PyTorch, [images, 16, height/8, width/8]."
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        path_option(
            help="A reference image, if the model reads reference images; may be given several times. With --mask or "
            "--strength, or for any other model: the image to start from. PNG, JPEG or WebP."
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        path_option(help="With one --image: what to repaint, white on an image of the same size. The rest stays."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="With one --image: how much of it is repainted, above 0 and at most 1. By default 0.6."),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also write grid.png, all images on one sheet.")] = False,
    out: Annotated[Path, path_option(help="Directory for the images.")] = Path("images"),
    *,
    sampling: options.SamplingOptions,
    hosts: options.HostOptions,
) -> None:
    """Makes images from prompts: one PNG each, with its settings in the metadata.

    Several hosts divide the images; run the same command on each, as for arcflow train.
    """
    if (prompt is None) == (prompts_file is None):
        raise UserError("say what the images should show: either with --prompt or with --prompts-file")
    with rare_collections(), hosts.connected():
        from arcflow_jax.data.prompts import read_prompts

        prompts = prompt if prompts_file is None else read_prompts(prompts_file).texts
        make_images(prompts or [], images, latents, (image or [], mask, strength), grid, out, sampling)


@contextlib.contextmanager
def rare_collections() -> Generator[None]:
    """Inside the `with` block, Python looks for garbage two hundred times less often.

    Imports, loading and tracing make many objects that stay, and the search took an eighth of the processor time to the
    first image.
    """
    before = gc.get_threshold()
    gc.set_threshold(200 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def make_images(
    prompts: Sequence[str],
    images: int,
    latents: Path | None,
    given: tuple[Sequence[Path], Path | None, float | None],
    grid: bool,
    out: Path,
    sampling: options.SamplingOptions,
) -> None:
    """`sample`, once the processes are connected; `given` are images, mask and strength."""
    from arcflow_jax.data.images import read_image
    from arcflow_jax.data.output import contact_sheet, file_name, read_latents, save_new_image
    from arcflow_jax.data.prompts import check_prompts
    from arcflow_jax.parallel.processes import is_main
    from arcflow_jax.parallel.together import check_directory, check_same, gathered, own_share
    from arcflow_jax.sampling_settings import batch_for, check_ranges
    from arcflow_jax.storage.atomic import make_directory
    from arcflow_jax.storage.paths import as_path

    check_prompts(prompts)
    check_ranges(strength=given[2])
    image_files, mask_file, strength = given
    if not image_files and (mask_file is not None or strength is not None):
        name = "--strength" if mask_file is None else "--mask"
        raise UserError(f"{name} is for an image to start from: give --image as well, or leave {name} out")
    settings: dict[str, Any] = {**sampling.settings(), "strength": strength}
    check_same({"the prompts": list(prompts), "the options": [images, sampling.batch_size, settings]})
    noise = None if latents is None else read_latents(latents)
    given_images = [read_image(file) for file in image_files] or None
    mask = None if mask_file is None else read_image(mask_file)
    pipeline = sampling.load()
    wanted = own_share(len(prompts) * images, batch_for(pipeline.mesh, sampling.batch_size))
    with options.progress_bar() as progress:
        stream = pipeline.stream(
            prompts,
            image=given_images,
            mask_image=mask,
            num_images_per_prompt=images,
            latents=noise,
            batch_size=sampling.batch_size,
            wanted=wanted,
            progress=lambda activity, done: progress(activity, done - wanted.start, len(wanted)),
            **settings,
        )
        if is_main():
            make_directory(out)
        check_directory(out)
        paths = []
        for made in stream:
            if latents is not None:
                made.info["latents"] = latents
            path = save_new_image(made, out / file_name(made))
            print(path)
            paths.append(str(path))
        paths = [path for each in gathered(paths) for path in each]
        if grid and is_main():
            sheet = contact_sheet([read_image(as_path(path)) for path in paths], columns=images if images > 1 else None)
            print(save_new_image(sheet, out / "grid.png"))
