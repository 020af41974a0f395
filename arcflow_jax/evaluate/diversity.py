"""How different the images of one prompt are: the mean distance over all pairs of them."""

# P prompts, S images of each, F features

from __future__ import annotations

import numpy as np


def mean_pairwise_distance(features: np.ndarray) -> np.ndarray:  # [P] float64
    """The mean of 1 − cosine over all pairs of a prompt's images, whose features are [P, S, F], S ≥ 2.

    For vectors of length 1, half the mean square distance of all pairs is the trace of their sample covariance.
    This sum has no cancellation where the images are alike. Vectors of zeros have no direction, and count as alike.
    """
    x = np.asarray(features, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    return np.square(x - x.mean(-2, keepdims=True)).sum((-2, -1)) / (x.shape[-2] - 1)
