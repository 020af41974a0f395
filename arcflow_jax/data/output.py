"""Pictures to disk, and latents from it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from safetensors import SafetensorError
from safetensors.numpy import load_file

from arcflow_jax.errors import UserError, one_line


def make_folder(path: Path) -> None:
    """Makes a directory for pictures. Raises UserError if it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write pictures to {path}: {error.strerror}") from None


def save_picture(image: Image.Image, path: Path) -> None:
    """A PNG with the picture's `info`, the settings that it was made with, as text. Raises UserError."""
    text = PngImagePlugin.PngInfo()
    for name, value in image.info.items():
        text.add_itxt(name, str(value))
    aside = path.with_suffix(".tmp")
    try:
        image.save(aside, "PNG", pnginfo=text)
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write pictures to {path.parent}: {error.strerror or error}") from None
    finally:
        aside.unlink(missing_ok=True)


def file_name(image: Image.Image) -> str:
    """The picture's number, its seed unless its noise was given, and what it shows."""
    seed = f"-seed{image.info['seed']}" if "seed" in image.info else ""
    words = re.sub(r"\W+", "-", image.info["prompt"].lower()).strip("-")[:60]
    return f"{image.info['image']:04d}{seed}-{words}.png"


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """All pictures, of one size, on one white sheet, row by row; by default about as many rows as columns."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].width + gap, images[0].height + gap
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def labelled_sheet(columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str]) -> Image.Image:
    """Pictures of one size on a white sheet: each column under its name, each row under what it shows.

    Small pictures are enlarged, so that the labels have room.
    """
    font, line, gap = ImageFont.load_default(14), 20, 4
    first = next(iter(columns.values()))[0]
    times = max(1, math.ceil(192 / first.width))
    width, height = first.width * times + gap, first.height * times + line
    sheet = Image.new("RGB", (len(columns) * width - gap, line + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, pictures) in enumerate(columns.items()):
        draw.text((i * width, 1), name, "black", font)
        for j, picture in enumerate(pictures):
            enlarged = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (i * width, line + j * height + line))
    for j, text in enumerate(rows):
        draw.text((0, line + j * height + 1), text, "black", font)
    return sheet


def read_latents(path: Path) -> np.ndarray:
    """The one array in a .safetensors or .npy file. Raises UserError if there is none, or several."""
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix != ".safetensors":
            raise UserError(f"latents {path}: it has to be a .safetensors or a .npy file")
        tensors = load_file(path)
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise UserError(f"cannot read latents from {path}: {one_line(error)}") from None
    if len(tensors) != 1:
        raise UserError(f"latents {path}: it has to hold one tensor, not {len(tensors)}")
    return next(iter(tensors.values()))
