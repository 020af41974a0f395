"""Real pictures with captions, for distillation with data: a folder of them, and their latents."""

# B pictures, H, W height and width in pixels, N tokens, C latent channels

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
class Picture:
    file: Path
    caption: str


def read_pictures(folder: str | Path) -> list[Picture]:
    """The pictures of a folder, by name.

    Captions are those of metadata.jsonl, as the Hugging Face image folder has it, a line {"file_name": …, "text": …}
    a picture; or without it, of a text file of the picture's name beside each.

    Raises:
      UserError: if there are none, or a picture or a caption is missing or empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"folder of pictures {folder} does not exist")
    try:
        pictures = from_metadata(folder) if (folder / METADATA).is_file() else from_text_files(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the captions in {folder}: {one_line(error)}") from None
    if not pictures:
        raise UserError(f"{folder} holds no pictures: it has to have files {', '.join(SUFFIXES)}")
    for picture in pictures:
        if not picture.caption:
            raise UserError(f"the caption of {picture.file} is empty")
    return pictures


def captions(folder: str, pictures: Sequence[Picture]) -> Prompts:
    """The captions of the pictures of a folder."""
    return Prompts(folder, [picture.caption for picture in pictures], empty=0)


def from_metadata(folder: Path) -> list[Picture]:
    pictures = []
    for number, line in enumerate((folder / METADATA).read_text(encoding="utf-8").splitlines(), 1):
        where = f"{folder / METADATA}, line {number}"
        try:
            values = json.loads(line)
            file, caption = folder / values["file_name"], values["text"].strip()
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(f'{where}: it has to be {{"file_name": …, "text": …}}') from None
        if not file.is_file():
            raise UserError(f"{where}: there is no {file}")
        pictures.append(Picture(file, caption))
    return pictures


def from_text_files(folder: Path) -> list[Picture]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    for file in files:
        if not file.with_suffix(".txt").is_file():
            raise UserError(f"{file} has no caption: there is neither {file.with_suffix('.txt').name} nor {METADATA}")
    return [Picture(file, file.with_suffix(".txt").read_text(encoding="utf-8").strip()) for file in files]


def pixels(file: Path, height: int, width: int) -> np.ndarray:  # [H, W, 3] float32 in [-1, 1]
    """A picture, scaled to cover height × width, and its middle cut out. Raises UserError if it cannot be read."""
    try:
        with Image.open(file) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read picture {file}: {one_line(error)}") from None
    return np.asarray(fitted, np.float32) / 127.5 - 1
