"""Text-image retrieval: whether an image's own prompt is the nearest one of all prompts."""

# B images, P prompts, F features

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RANKS = (1, 5)
TIE = 1e-6  # cosines of float32 features that are closer than this are equal


def recall(
    images: np.ndarray, prompts: np.ndarray, own: Sequence[int], ranks: Sequence[int] = RANKS
) -> np.ndarray:  # [B, len(ranks)] float64
    """For each image and each k in `ranks`, whether its own prompt is among the k nearest: 0, 1, or a share.

    Of prompts that are equally near, each order is equally likely, and the value is the probability over these orders.
    So features that are the same for all images give chance, k / P, and not 1.

    Args:
      images, prompts: features of length 1, [B, F] and [P, F].
      own: the number of each image's prompt.
    """
    cosines = np.asarray(images, np.float64) @ np.asarray(prompts, np.float64).T
    apart = cosines - np.take_along_axis(cosines, np.asarray(own)[:, None], axis=1)
    nearer, level = (apart > TIE).sum(1), (np.abs(apart) <= TIE).sum(1)  # level: with the own prompt
    return np.clip((np.asarray(ranks) - nearer[:, None]) / level[:, None], 0, 1)
