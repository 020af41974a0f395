"""Writes images to disk, and reads latents from it."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from arcflow_jax.errors import UserError, one_line
from arcflow_jax.storage.atomic import cannot_write, write_file
from arcflow_jax.storage.files import file_size
from arcflow_jax.storage.lock import NAME_BYTES, cut_to_bytes
from arcflow_jax.storage.safetensors import read_header


def save_image(image: Image.Image, path: Path) -> None:
    """Writes a PNG. Raises UserError."""
    with cannot_write(path):
        write_file(path, png(image))


def save_new_image(image: Image.Image, path: Path) -> Path:
    """Writes a PNG under the first unused name of `a.png`, `a-2.png`, `a-3.png`, …, and returns its path.

    Raises UserError.
    """
    data, name, number = png(image), path, 1
    with cannot_write(path):
        while True:
            if not name.exists():
                with contextlib.suppress(FileExistsError):  # another process has just written it
                    write_file(name, data, new=True)
                    return name
            number += 1
            name = path.with_name(f"{path.stem}-{number}{path.suffix}")


def png(image: Image.Image, compression: int = 6) -> bytes:
    """The bytes of a PNG with the image's `info`, the settings that it was made with, as text.

    `compression` is zlib's level: 1 is fast, 9 small.
    """
    text = PngImagePlugin.PngInfo()
    for name, value in image.info.items():
        text.add_itxt(name, str(value))
    encoded = io.BytesIO()
    image.save(encoded, "PNG", pnginfo=text, compress_level=compression)
    return encoded.getvalue()


def file_name(image: Image.Image) -> str:
    """A name from the image's `info`: its number, seed, steps, student (or "teacher") and prompt.

    An image from given latents has no seed. The name has at most 204 bytes, whatever the script.
    """
    seed = f"seed{image.info['seed']}" if "seed" in image.info else None
    student = words(Path(image.info["adapter"]).name) if "adapter" in image.info else "teacher"
    number, steps = f"{image.info['image']:04d}", f"{image.info['steps']}steps"
    name = "-".join(filter(None, [number, seed, steps, student[:40], words(image.info["prompt"])[:60]]))
    return cut_to_bytes(name, NAME_BYTES) + ".png"


def words(text: str) -> str:
    """Letters and digits in lower case, with - between the words."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """Images of one size on a white sheet, row by row; by default with about as many rows as columns."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].width + gap, images[0].height + gap
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def labelled_sheet(columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str]) -> Image.Image:
    """Images of one size on a white sheet, with a name above each column and a text above each row.

    Small images are enlarged to make room for the labels.
    """
    font, line, gap = ImageFont.load_default(14), 20, 4
    first = next(iter(columns.values()))[0]
    times = max(1, math.ceil(192 / first.width))
    width, height = first.width * times + gap, first.height * times + line
    sheet = Image.new("RGB", (len(columns) * width - gap, line + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, images) in enumerate(columns.items()):
        draw.text((i * width, 1), name, "black", font)
        for j, image in enumerate(images):
            enlarged = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (i * width, line + j * height + line))
    for j, text in enumerate(rows):
        draw.text((0, line + j * height + 1), text, "black", font)
    return sheet


def read_latents(path: Path) -> np.ndarray:
    """The array in a .npy file, or the only tensor in a .safetensors file. Raises UserError if there is not one."""
    if path.suffix == ".npy":
        file_size(path)
        try:
            # A memory map of a file that is shorter than its header says is refused before memory is allocated
            with np.errstate(over="raise"):  # of the size
                return np.array(np.lib.format.open_memmap(path, mode="r"))
        except Exception as error:  # NumPy parses the header as Python, and raises whatever that raises
            raise UserError(f"cannot read latents from {path}: {one_line(error)}") from None
    if path.suffix != ".safetensors":
        raise UserError(f"latents {path}: the file has to be .safetensors or .npy")
    tensors = read_header(path)
    if len(tensors) != 1:
        raise UserError(f"latents {path}: the file has to hold one tensor, not {len(tensors)}")
    return np.asarray(next(iter(tensors.values())))
