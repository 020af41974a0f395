"""Running mean and covariance of features that arrive in batches, and the Fréchet distance between two sets."""

# B vectors of a batch, F features

from __future__ import annotations

import dataclasses

import numpy as np

from arcflow_jax.errors import UserError


@dataclasses.dataclass
class Moments:
    """Count, mean and scatter matrix of any number of vectors, in float64.

    Attributes:
      count: number of vectors.
      mean: [F].
      scatter: Σ (x − mean)(x − mean)ᵀ over the vectors, [F, F].
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def from_features(cls, features: np.ndarray) -> Moments:
        """The moments of features [B, F]."""
        features = np.asarray(features, np.float64)
        mean = features.mean(0)
        return cls(len(features), mean, (features - mean).T @ (features - mean))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets together (Chan, Golub and LeVeque 1983). Loses no digits where the mean is large."""
        count, apart = self.count + other.count, other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * (other.count / count),
            self.scatter + other.scatter + np.outer(apart, apart) * (self.count * other.count / count),
        )

    @property
    def covariance(self) -> np.ndarray:
        """Sample covariance [F, F], divided by count − 1. Raises UserError on fewer than two vectors."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, but there is {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance between the normal distributions with these moments (Dowson and Landau 1982; FID: Heusel 2017).

    |μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½). The trace of the root is the sum of the square roots of the eigenvalues of
    Σa^½ Σb Σa^½. That matrix is symmetric, so no complex root is ever taken, and singular covariances are fine.

    Raises:
      UserError: if either has fewer than two vectors, or their lengths differ.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"cannot compare {len(a.mean)} features with {len(b.mean)}: both need the same network")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b.covariance @ root), 0, None)).sum()
    apart = a.mean - b.mean
    return float(apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)
