"""Real images with captions, for distillation with data."""

# H, W height and width in pixels

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from arcflow_jax.data.prompts import Prompts
from arcflow_jax.errors import UserError, one_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"


@dataclasses.dataclass(frozen=True)
class CaptionedImage:
    """An image file and its caption."""

    file: Path
    caption: str


def read_images(folder: str | Path) -> list[CaptionedImage]:
    """The images of a folder with their captions, sorted by name.

    The captions are in metadata.jsonl, as in Hugging Face's image folders, with a line {"file_name": …, "text": …} per
    image. Without metadata.jsonl, each image has a text file of the same name beside it.

    Raises:
      UserError: if there are no images, or an image or a caption is missing or empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"folder of images {folder} does not exist")
    try:
        images = from_metadata(folder) if (folder / METADATA).is_file() else from_text_files(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the captions in {folder}: {one_line(error)}") from None
    if not images:
        raise UserError(f"{folder} holds no images: it has to have files {', '.join(SUFFIXES)}")
    for image in images:
        if not image.caption:
            raise UserError(f"the caption of {image.file} is empty")
    return images


def captions(folder: str, images: Sequence[CaptionedImage]) -> Prompts:
    """The captions of a folder's images, as prompts."""
    return Prompts(folder, [image.caption for image in images], empty=0)


def from_metadata(folder: Path) -> list[CaptionedImage]:
    """Images with captions in metadata.jsonl."""
    images = []
    for number, line in enumerate((folder / METADATA).read_text(encoding="utf-8").splitlines(), 1):
        where = f"{folder / METADATA}, line {number}"
        try:
            values = json.loads(line)
            file, caption = folder / values["file_name"], values["text"].strip()
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(f'{where}: it has to be {{"file_name": …, "text": …}}') from None
        if not file.is_file():
            raise UserError(f"{where}: there is no {file}")
        images.append(CaptionedImage(file, caption))
    return images


def from_text_files(folder: Path) -> list[CaptionedImage]:
    """Images with captions in text files."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    for file in files:
        if not file.with_suffix(".txt").is_file():
            raise UserError(f"{file} has no caption: there is neither {file.with_suffix('.txt').name} nor {METADATA}")
    return [CaptionedImage(file, file.with_suffix(".txt").read_text(encoding="utf-8").strip()) for file in files]


def pixels(file: Path, height: int, width: int) -> np.ndarray:  # [H, W, 3] float32 in [-1, 1]
    """An image, scaled to cover height × width and cropped at its center. Raises UserError if it cannot be read."""
    try:
        with Image.open(file) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read image {file}: {one_line(error)}") from None
    return np.asarray(fitted, np.float32) / 127.5 - 1
