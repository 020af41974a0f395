"""FLUX.1-Kontext: FLUX.1, whose transformer also reads a reference image.

Both have the same transformer, so `of_transformer` takes that of FLUX.1-Kontext for one of FLUX.1.
"""

# R tokens of the reference image

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from PIL import Image

from arcflow_jax.errors import UserError
from arcflow_jax.families import flux
from arcflow_jax.families.family import ReferenceImages
from arcflow_jax.families.latents import position_ids

# Width and height of the images that it was trained on, as in diffusers
RESOLUTIONS = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)),
    *((1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688)),
    (1568, 672),
)


def fitted(image: Image.Image, side: int) -> Image.Image:
    """A reference image as FluxKontextPipeline in diffusers has it: scaled to the one of `RESOLUTIONS` that is closest
    in aspect ratio. Raises UserError if it is smaller than a token."""
    width, height = (length // side * side for length in image.size)
    if not (width and height):
        raise UserError(
            f"a reference image is {image.height}x{image.width}, but has to have at least {side} pixels a side"
        )
    _, *size = min((abs(width / height - w / h), w, h) for w, h in RESOLUTIONS)
    return image.resize((size[0] // side * side, size[1] // side * side), Image.Resampling.LANCZOS)


def reference_positions(grids: Sequence[tuple[int, int]]) -> jax.Array:  # [R, 3]
    """(1, row, column) of each token."""
    return jnp.concatenate([position_ids(*grid).at[:, 0].set(1) for grid in grids])


FAMILY = dataclasses.replace(
    flux.FAMILY, pipeline="FluxKontextPipeline", references=ReferenceImages(1, fitted, reference_positions)
)
