"""The page's images, opened and fitted to the sizes that are served: those to start from, painted where they are made
anew, and reference images."""

# n reference images, H, W size in pixels

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from arcflow_jax.data.images import BROKEN, FORMATS, in_rgb, upright
from arcflow_jax.errors import UserError
from arcflow_jax.sampling_settings import sides
from arcflow_jax.serve.settings import Start

MOST = 2**25  # pixels of a photo
OPAQUE = 128  # alpha from which a pixel counts as painted


@dataclasses.dataclass(frozen=True, eq=False)
class StartImage:
    """An image in each of the sizes that are served.

    Attributes:
      fitted: without a mask, by size.
      masked: with a mask, in the size that it was painted in.
    """

    fitted: dict[str, Start]
    masked: tuple[str, Start] | None = None

    def start(self, size: str) -> Start:
        """What an image of this size starts from."""
        return self.masked[1] if self.masked and self.masked[0] == size else self.fitted[size]

    def painted(self, repaint: np.ndarray) -> StartImage:
        """The same, but made anew only where `repaint` [H, W], bool, is true; everywhere if it is true nowhere."""
        size = f"{repaint.shape[1]}x{repaint.shape[0]}"
        if size not in self.fitted or not repaint.any():
            return StartImage(self.fitted)
        return StartImage(self.fitted, (size, Start(self.fitted[size].pixels, repaint)))


@dataclasses.dataclass(frozen=True, eq=False)
class References:
    """Reference images, all of them in each of the sizes that are served: [n, H, W, 3], by size."""

    fitted: dict[str, Start]

    def __len__(self) -> int:
        return len(next(iter(self.fitted.values())).pixels)


def open_image(file: str | Path, sizes: Sequence[str]) -> StartImage:
    """An image file, scaled to cover each of these sizes and cropped at its center. Raises UserError."""
    image = opened(file)
    return StartImage({size: Start(cropped(image, size), None) for size in sizes})


def open_references(files: Sequence[str | Path], sizes: Sequence[str], most: int) -> References:
    """The same of one or more reference images. Raises UserError, for more than `most` as well."""
    if len(files) > most:
        raise UserError(f"There are {len(files)} reference images. The model reads {most} at most.")
    images = list(map(opened, files))
    return References({size: Start(np.stack([cropped(image, size) for image in images]), None) for size in sizes})


def opened(file: str | Path) -> Image.Image:
    """The image in a file, upright and in RGB. Raises UserError."""
    try:
        with Path(file).open("rb") as data:
            return in_rgb(upright(data, MOST))
    except BROKEN:
        formats = ", ".join(FORMATS)
        raise UserError(
            f"This image cannot be read. It has to be one of {formats}, with at most {MOST // 10**6} million pixels."
        ) from None


def cropped(image: Image.Image, size: str) -> np.ndarray:  # [H, W, 3], uint8
    """An image, scaled to cover a size and cropped at its center."""
    return np.asarray(ImageOps.fit(image, sides(size), Image.Resampling.LANCZOS))


def read_mask(url: str, most: int) -> np.ndarray:  # [H, W], bool
    """Where a canvas of at most so many pixels is painted; its content as a data URL. Raises one of `BROKEN`."""
    image = upright(io.BytesIO(base64.b64decode(url.partition(",")[2])), most)
    return np.asarray(image.convert("RGBA").getchannel("A")) >= OPAQUE
