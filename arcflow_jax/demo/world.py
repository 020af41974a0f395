"""A world: images and captions that a bundled teacher knows, and what measures such images."""

# B images, P pixels along a side, F features, A attributes

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from arcflow_jax.demo.captions import Captions
from arcflow_jax.demo.judge import load_judge
from arcflow_jax.evaluate.frechet import Moments


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """What the demo and the benchmarks know of a world.

    Attributes:
      captions: all of them.
      folder: has its prompts, its judge's weights, and what the judge finds in true images.
      judge_sizes: arguments of `Judge`.
    """

    captions: Captions[Any]
    folder: Path
    judge_sizes: Mapping[str, Any]

    @property
    def train_prompts(self) -> Path:
        return self.folder / "prompts-train.txt"

    @property
    def test_prompts(self) -> Path:
        """None of them is in `train_prompts`."""
        return self.folder / "prompts-test.txt"

    @functools.cached_property
    def _judged(self) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
        judge = load_judge(self.folder / "judge.safetensors", self.captions.values, **self.judge_sizes)
        graphdef, state = nnx.split(judge)

        @jax.jit
        def judged(images: jax.Array) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, state)
            return model(images)[0], model.read(images)

        return judged

    def read(self, images: np.ndarray | jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """What the judge finds in images [B, P, P, 3] in [-1, 1]: features [B, F] and attributes [B, A]."""
        features, attributes = self._judged(jnp.asarray(images))
        return np.asarray(features), np.asarray(attributes)

    @functools.cached_property
    def true_features(self) -> Moments:
        """The moments of the judge's features of true images that show the test prompts."""
        arrays = load_file(self.folder / TRUE_FEATURES)
        return Moments(int(arrays["count"]), arrays["mean"], arrays["scatter"])


TRUE_FEATURES = "true-features.safetensors"


def write_true_features(folder: Path, moments: Moments) -> None:
    """Writes what `World.true_features` reads."""
    arrays = {name: np.asarray(value, np.float64) for name, value in vars(moments).items()}
    save_file(arrays, folder / TRUE_FEATURES)
