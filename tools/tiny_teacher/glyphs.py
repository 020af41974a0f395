"""The emoji's bitmaps, read from the font Noto Color Emoji.

The font is not bundled. Debian and Ubuntu have it in the package fonts-noto-color-emoji.
"""

# E emoji, P pixels along a side

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from arcflow_jax.demo import emoji

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CELL = 136, 128  # width and height in pixels of the font's bitmaps


def read_glyphs(characters: Iterable[str], font: Path = FONT) -> np.ndarray:
    """Bitmaps [E, P, P, 4] of single characters: RGBA, uint8, premultiplied by alpha.

    A bitmap is cut to a square of 128 pixels and halved. The mean of four premultiplied pixels is what these four show
    over any background. Without the premultiplication, the colours of invisible pixels would show at the edges.
    """
    from fontTools.ttLib import TTFont  # which only the emoji world needs

    file = TTFont(font)
    names, bitmaps = file.getBestCmap(), file["CBDT"].strikeData[0]
    glyphs = []
    for character in characters:
        image = Image.open(io.BytesIO(bitmaps[names[ord(character)]].imageData)).convert("RGBA").convert("RGBa")
        if image.size != CELL:
            raise ValueError(f"{character} is {image.size} pixels in {font}, not {CELL}")
        beside = (CELL[0] - CELL[1]) // 2
        square = image.crop((beside, 0, CELL[0] - beside, CELL[1]))
        glyphs.append(np.asarray(square.resize((emoji.SIDE, emoji.SIDE), Image.Resampling.BOX)))
    return np.stack(glyphs)


def make_glyphs(work: Path) -> None:
    save_file({"glyphs": read_glyphs(emoji.read_names().values())}, work / "glyphs.safetensors")


def load_glyphs(work: Path) -> np.ndarray:
    return load_file(work / "glyphs.safetensors")["glyphs"]
