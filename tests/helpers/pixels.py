"""Images as numbers, and whether two lists of images are the same."""

from __future__ import annotations

import numpy as np


def pixels(images) -> np.ndarray:  # [B, H, W, 3]
    return np.stack([np.asarray(image, np.int32) for image in images])


def assert_same_images(images, others, levels: int = 1) -> None:
    """Equal up to `levels` of 255, the effect of rounding."""
    np.testing.assert_allclose(pixels(images), pixels(others), atol=levels, rtol=0)
