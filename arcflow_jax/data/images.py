"""Real images with captions, for distillation with data; reference images with instructions; images to be judged."""

# H, W height and width in pixels

from __future__ import annotations

import dataclasses
import math
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from arcflow_jax.data.prompts import Prompts
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.parallel.processes import several
from arcflow_jax.parallel.together import from_first
from arcflow_jax.storage.files import cannot_read, file_size, is_inside, json_records
from arcflow_jax.storage.paths import as_path, file_test

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"
CAPTION = 2**20  # bytes of a caption's file
# What Pillow raises for a file that is damaged, of another format, or too large
BROKEN = (
    *(OSError, ValueError, SyntaxError, TypeError, struct.error),  # the last two of damaged EXIF data
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


@dataclasses.dataclass(frozen=True)
class CaptionedImages:
    """An image file, or several reference images that belong together, and the caption or instruction."""

    files: tuple[Path, ...]
    caption: str


def read_images(folder: str | Path, most: int = 1) -> list[CaptionedImages]:
    """The images of a folder with their captions, sorted by name.

    The captions are in metadata.jsonl, as in Hugging Face's image folders, with a line {"file_name": …, "text": …} per
    image, or {"file_names": […], "text": …} for several. Without metadata.jsonl, each image has a text file of the same
    name beside it.

    Args:
      most: how many images a caption may have. All have as many.

    Raises:
      UserError: if there are no images, an image or a caption is missing or empty, there are too many or different
        numbers of images, or metadata.jsonl names a file outside of the folder.
    """
    folder = as_path(folder)
    with cannot_read(folder):
        if not folder.is_dir():
            raise UserError(f"folder of images {folder} does not exist")
        images = from_metadata(folder, most) if (folder / METADATA).is_file() else from_text_files(folder)
    if not images:
        raise UserError(f"{folder} holds no images: it has to have files {', '.join(SUFFIXES)}")
    for image in images:
        if not image.caption:
            raise UserError(f"the caption of {image.files[0]} is empty")
        if len(image.files) != len(images[0].files):
            first, other = (f"{each.files[0]} belongs to {len(each.files)}" for each in (images[0], image))
            raise UserError(f"{first} reference images, {other}: all captions of a folder need the same number")
    return images


def read_images_once(folder: str | Path, most: int = 1) -> list[CaptionedImages]:
    """As `read_images`, but only the first process lists the folder, and tells the others.

    Each process may have its own copy of the folder. If it lacks an image, the error comes when it opens the image.
    """
    if not several():
        return read_images(folder, most)
    folder = as_path(folder)
    if not folder.is_dir():
        raise UserError(f"folder of images {folder} does not exist")
    found = from_first(
        lambda: [
            ([file.relative_to(folder).as_posix() for file in x.files], x.caption) for x in read_images(folder, most)
        ]
    )
    return [CaptionedImages(tuple(folder / name for name in names), caption) for names, caption in found]


def captions(folder: str, images: Sequence[CaptionedImages]) -> Prompts:
    """The captions of a folder's images, as prompts."""
    return Prompts(folder, [image.caption for image in images], empty=0)


def from_metadata(folder: Path, most: int) -> list[CaptionedImages]:
    """Images, up to `most` together, with captions in metadata.jsonl."""
    images, is_file = [], file_test(folder)
    for where, record in json_records(folder / METADATA):
        names, caption = [record.get("file_name")], record.get("text")
        if most > 1 and isinstance(record.get("file_names"), list):
            names = record["file_names"]
        if not (all(isinstance(name, str) for name in names) and isinstance(caption, str)):
            lists = ', or {"file_names": […], "text": …}' if most > 1 else ""
            raise UserError(f'{where}: it has to be {{"file_name": …, "text": …}}{lists}')
        if not 1 <= len(names) <= most:
            raise UserError(f"{where}: file_names has {len(names)} images, but has to have 1 to {most}")
        for name in names:
            if not is_inside(name):
                wrong = one_line(repr(name))
                raise UserError(f"{where}: file_name is {wrong}, but has to be a path inside of the folder")
            if not is_file(folder / name):
                raise UserError(f"{where}: there is no {folder / name}")
        images.append(CaptionedImages(tuple(folder / name for name in names), caption.strip()))
    return images


def from_text_files(folder: Path) -> list[CaptionedImages]:
    """Images with captions in text files."""
    images, is_file = [], file_test(folder)
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES):
        text = file.with_suffix(".txt")
        if not is_file(text):
            raise UserError(f"{file} has no caption: there is neither {text.name} nor {METADATA}")
        file_size(text, CAPTION)
        try:
            images.append(CaptionedImages((file,), text.read_text(encoding="utf-8-sig").strip()))
        except UnicodeDecodeError as error:
            raise UserError(f"{text} is not text in UTF-8: {error.reason}") from None
    return images


def read_image(file: Path) -> Image.Image:
    """An image in RGB as a viewer shows it: turned as its EXIF data say, 16 bits rounded to 8, transparency over white.

    Its `info` is that of the file.

    Raises:
      UserError: if the file is missing, damaged, of another format than `FORMATS`, or has more pixels than Pillow
        takes for harmless.
    """
    file_size(file)
    try:
        with file.open("rb") as data:
            image = upright(data)
        rgb = in_rgb(image)
    except BROKEN as error:
        raise UserError(f"cannot read image {file}: {one_line(error)}") from None
    rgb.info = image.info
    return rgb


def text_in(file: Path, name: str) -> str | None:
    """A text among an image's `info`, None if it has none. A text before the pixels is found without decoding them.

    Raises UserError as `read_image`.
    """
    file_size(file)
    try:
        with file.open("rb") as data, Image.open(data, formats=FORMATS) as image:
            if name not in image.info and image.format == "PNG":
                image.load()  # a text may stand after the pixels
            return image.info.get(name)
    except BROKEN as error:
        raise UserError(f"cannot read image {file}: {one_line(error)}") from None


def upright(data: IO[bytes], most: float = math.inf) -> Image.Image:
    """An image in its own mode, turned as its EXIF data say, with the `info` of its file.

    Raises one of `BROKEN`; if it has more than `most` pixels, or more than Pillow takes for harmless, before it is
    decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(data, formats=FORMATS) as opened:
            if opened.width * opened.height > most:
                raise Image.DecompressionBombError(f"it has more than {most} pixels")
            image = ImageOps.exif_transpose(opened)
    image.info = opened.info
    return image


def in_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB: 16 bits rounded to 8, transparency over white."""
    if image.mode.startswith("I"):  # 16-bit gray
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def pixels(file: Path, height: int, width: int) -> np.ndarray:  # [H, W, 3] float32 in [-1, 1]
    """An image, scaled to cover height × width and cropped at its center. Raises UserError if it cannot be read."""
    fitted = ImageOps.fit(read_image(file), (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted, np.float32) / 127.5 - 1
