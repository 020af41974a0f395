"""Writes pictures to disk."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, PngImagePlugin

from arcflow_jax.errors import UserError


def save_pictures(
    images: Sequence[Image.Image], prompts: Sequence[str], out: Path, *, seed: int, **settings: object
) -> list[Path]:
    """One PNG a picture under `out`, named by number, seed and prompt, its settings in the metadata.

    Raises:
      UserError: if `out` cannot be written.
    """
    paths = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            info = PngImagePlugin.PngInfo()
            for name, value in {"prompt": prompt, "seed": seed, "picture": i, **settings}.items():
                if value is not None:
                    info.add_itxt(name, str(value))
            words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60]
            path = out / f"{i:04d}-seed{seed}-{words}.png"
            aside = path.with_suffix(".tmp")
            try:
                image.save(aside, "PNG", pnginfo=info)
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)
            paths.append(path)
    except OSError as error:
        raise UserError(f"cannot write pictures to {out}: {error.strerror or error}") from None
    return paths
