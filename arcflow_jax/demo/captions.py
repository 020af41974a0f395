"""The captions of a world: what its attributes can be, which of them a caption may omit, and random ones."""

# B batch, A attributes

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

C = TypeVar("C")

# Where in an image, in both worlds
POSITIONS = ("left", "right", "top", "bottom", "center")
POSITION_WORDS = ("on the left", "on the right", "at the top", "at the bottom", "in the center")


@dataclasses.dataclass(frozen=True, eq=False)
class Captions(Generic[C]):
    """All captions of a world.

    Attributes:
      of_indices: makes a caption from the index of each attribute's value, -1 if it is omitted; str() gives
        its words.
      values: of each attribute.
      omitted: the probability that a caption omits an attribute; 0 for an attribute that is not here.
    """

    of_indices: Callable[..., C]
    values: Mapping[str, Sequence[str]]
    omitted: Mapping[str, float]

    @functools.cached_property
    def _firsts(self) -> list[int]:
        return [-1 if name in self.omitted else 0 for name in self.values]

    @functools.cached_property
    def _by_words(self) -> dict[str, C]:
        return {str(caption): caption for caption in self.all()}

    def all(self) -> list[C]:
        """Every caption, in a fixed order."""
        choices = (range(first, len(values)) for first, values in zip(self._firsts, self.values.values(), strict=True))
        return [self.of_indices(*indices) for indices in itertools.product(*choices)]

    def of(self, prompt: str) -> C:
        """The caption with these words. Raises KeyError if there is none."""
        return self._by_words[prompt]

    def words(self) -> list[str]:
        """Every word of a caption, sorted."""
        return sorted({word for prompt in self._by_words for word in prompt.split()})

    def index(self, attributes: jax.Array) -> jax.Array:
        """The index in `all()` of the captions with attributes [B, A]."""
        index = 0
        for value, first, values in zip(attributes.T, self._firsts, self.values.values(), strict=True):
            index = index * (len(values) - first) + value - first
        return index

    def random(self, key: jax.Array, count: int) -> jax.Array:
        """Attributes [B, A] of random captions: every value equally likely, -1 for an omitted one."""
        value_key, omit_key = jax.random.split(key)
        counts = jnp.array([len(values) for values in self.values.values()])
        drawn = jax.random.randint(value_key, (count, len(counts)), 0, counts)
        chance = jnp.array([self.omitted.get(name, 0.0) for name in self.values])
        return jnp.where(jax.random.bernoulli(omit_key, chance, drawn.shape), -1, drawn)


def within(key: jax.Array, ranges: np.ndarray, chosen: jax.Array) -> jax.Array:
    """Random numbers [B, …] between the lowest and the highest value, ranges [·, 2, …], of the chosen entries [B]."""
    low, high = jnp.moveaxis(jnp.asarray(ranges)[chosen], 1, 0)  # -1: the last entry
    return jax.random.uniform(key, low.shape, minval=low, maxval=high)
