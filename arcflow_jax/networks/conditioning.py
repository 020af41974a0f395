"""What a velocity depends on besides the state and σ: the contract of a family's conditioning, and CFG.

A family's own conditioning is a pytree (`networks.flux.FluxConditioning`, …). All else knows it by this contract.
"""

# B batch, N image tokens

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp


class Conditioning(Protocol):
    """Conditioning of B examples, batch first.

    Attributes:
      positions: of each image token, [N, axes]; shared by the batch.
    """

    @property
    def positions(self) -> jax.Array: ...

    @property
    def batch_size(self) -> int:
        """B."""
        ...

    def repeat(self, times: int) -> Self:
        """For a batch in which each example stands `times` times in a row."""
        ...

    def paired(self, negative: Any) -> Self:
        """For a batch in which each example is followed by itself under its negative."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["positive", "negative", "scale"], meta_fields=["norm_preserving"]
)
@dataclasses.dataclass(frozen=True)
class Guided:
    """Conditioning for classifier-free guidance of the teacher (Ho & Salimans 2022, arXiv 2207.12598).

    Attributes:
      positive: the prompts' conditioning.
      negative: of what guidance leads away from, as many examples.
      scale: guidance scale s in negative + s · (positive − negative).
      norm_preserving: gives each token the norm that it has without guidance, as diffusers' QwenImagePipeline does.
    """

    positive: Any
    negative: Any
    scale: jax.Array | float
    norm_preserving: bool = False

    @property
    def positions(self) -> jax.Array:
        return self.positive.positions

    @property
    def batch_size(self) -> int:
        return self.positive.batch_size

    def repeat(self, times: int) -> Guided:
        """For a batch in which each example stands `times` times in a row."""
        return dataclasses.replace(self, positive=self.positive.repeat(times), negative=self.negative.repeat(times))


def interleave(first: jax.Array, second: jax.Array) -> jax.Array:  # [B, ..] twice -> [2B, ..]
    """Two batches taking turns: an example of the first, then that of the second."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
