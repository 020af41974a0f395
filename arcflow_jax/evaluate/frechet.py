"""Mean and covariance of features that come a few at a time, and the Fréchet distance between two such."""

# B features at a time, F their length

from __future__ import annotations

import dataclasses

import numpy as np

from arcflow_jax.errors import UserError


@dataclasses.dataclass
class Moments:
    """Of any number of vectors, in float64.

    Attributes:
      count: how many.
      mean: [F].
      scatter: sum over them of the outer product of the deviation from the mean with itself, [F, F].
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Of features [B, F]."""
        features = np.asarray(features, np.float64)
        mean = features.mean(0)
        return cls(len(features), mean, (features - mean).T @ (features - mean))

    def __add__(self, other: Moments) -> Moments:
        """Of both together (Chan, Golub and LeVeque 1983), which loses no digits where the mean is large."""
        count, apart = self.count + other.count, other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * (other.count / count),
            self.scatter + other.scatter + np.outer(apart, apart) * (self.count * other.count / count),
        )

    @property
    def covariance(self) -> np.ndarray:
        """[F, F], divided by count − 1. Raises UserError on fewer than two vectors."""
        if self.count < 2:
            raise UserError(f"a covariance takes at least 2 pictures, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance between the normal distributions with these moments (Dowson and Landau 1982; FID: Heusel 2017).

    |μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½). The trace of the root is the sum of the roots of the eigenvalues of
    Σa^½ Σb Σa^½, which is symmetric, so that no complex root is ever taken and singular covariances do no harm.

    Raises:
      UserError: if either is of fewer than two vectors, or they are not equally long.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features of {len(a.mean)} and of {len(b.mean)} numbers cannot be compared")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b.covariance @ root), 0, None)).sum()
    apart = a.mean - b.mean
    return float(apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)
