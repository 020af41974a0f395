"""A small classifier of a world's images: reads an image's attributes, and gives features to compare sets of images.

It takes the place of Inception and CLIP in full-size evaluation. It was trained on rendered images only, is fixed, and
is the same for every sampler.
"""

# B batch, P pixels along a side, F features, A attributes

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.flax import load_file

from arcflow_jax.demo import SIDE
from arcflow_jax.networks.layers import Conv, GroupNorm, Linear


class Judge(nnx.Module):
    """Four strided convolutions, a layer of features, and one classifier per attribute.

    Args:
      attributes: the values of each attribute of a world.
      widths: channels after each convolution.
      features: F.
    """

    def __init__(
        self,
        attributes: Mapping[str, Sequence[str]],
        *,
        widths: Sequence[int],
        features: int,
        rngs: nnx.Rngs,
    ):
        pairs = zip((3, *widths), widths, strict=False)
        self.convs = nnx.List([Conv(a, b, 3, stride=2, rngs=rngs) for a, b in pairs])
        self.norms = nnx.List([GroupNorm(width, 4) for width in widths])
        self.features = Linear((SIDE // 16) ** 2 * widths[-1], features, rngs=rngs)
        self.classifiers = nnx.List([Linear(features, len(values), rngs=rngs) for values in attributes.values()])

    def __call__(self, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Features [B, F] and the logits of each attribute, of images [B, P, P, 3] in [-1, 1]."""
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.silu(norm(conv(x)))
        features = jnp.tanh(self.features(x.reshape(len(x), -1)))
        return features, [classifier(features) for classifier in self.classifiers]

    def read(self, images: jax.Array) -> jax.Array:
        """The most likely value of each attribute, [B, A]."""
        return jnp.stack([logits.argmax(-1) for logits in self(images)[1]], axis=-1)


def load_judge(file: Path, attributes: Mapping[str, Sequence[str]], **sizes: Any) -> Judge:
    """A trained judge, in float32. Arguments after its file as for `Judge`."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Judge(attributes, **sizes, rngs=nnx.Rngs(0))))
    saved = load_file(file)

    def weight(path: tuple[Any, ...], variable: Any) -> Any:
        return variable.replace(saved[".".join(map(str, path))].astype(variable.dtype))

    weights = [(path, weight(path, variable)) for path, variable in nnx.to_flat_state(abstract)]
    return nnx.merge(graphdef, nnx.from_flat_state(weights))


def agreement(read: np.ndarray, asked: np.ndarray, names: Iterable[str]) -> dict[str, float]:
    """Share of the requested attributes (asked ≥ 0) that were read, both [B, A]: by attribute, and "mean" over all."""
    named, right = asked >= 0, read == asked
    shares = {name: float(right[named[:, i], i].mean()) for i, name in enumerate(names) if named[:, i].any()}
    return {**shares, "mean": float(right[named].mean())}
