"""What a velocity depends on besides the state and σ: the protocol of conditioning, and classifier-free guidance.

Each family has its own conditioning, a pytree (`networks.flux.FluxConditioning`, …). Shared code knows this protocol
only.
"""

# B batch, N image tokens

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol, Self

import jax
import jax.numpy as jnp


class Conditioning(Protocol):
    """The conditioning of B examples: a pytree of arrays with a leading batch dimension, `positions` aside.

    Attributes:
      positions: position of each image token, [N, axes]; shared by the batch.
    """

    @property
    def positions(self) -> jax.Array: ...

    @property
    def batch_size(self) -> int:
        """B."""
        ...

    def repeat(self, times: int) -> Self:
        """Each example `times` times in a row, the order in which `flow.distill.Teacher` gets its states."""
        ...

    def paired(self, negative: Self) -> Self:
        """Each example followed by the same example with its negative prompt: the conditioning of 2·B states."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["positive", "negative", "scale"], meta_fields=["norm_preserving"]
)
@dataclasses.dataclass(frozen=True)
class Guided:
    """Conditioning for classifier-free guidance of the teacher (Ho & Salimans 2022, arXiv 2207.12598).

    Attributes:
      positive: conditioning of the prompts.
      negative: conditioning of the negative prompts, as many.
      scale: guidance scale s in negative + s · (positive − negative).
      norm_preserving: whether each token keeps the norm of its positive velocity, as in diffusers' QwenImagePipeline.
    """

    positive: Conditioning
    negative: Conditioning
    scale: jax.Array | float
    norm_preserving: bool = False

    @property
    def positions(self) -> jax.Array:
        return self.positive.positions

    @property
    def batch_size(self) -> int:
        return self.positive.batch_size

    def repeat(self, times: int) -> Guided:
        """Each example `times` times in a row."""
        return dataclasses.replace(self, positive=self.positive.repeat(times), negative=self.negative.repeat(times))


def interleave(first: jax.Array, second: jax.Array) -> jax.Array:  # [B, ..] twice -> [2B, ..]
    """The examples of two batches in turn: first[0], second[0], first[1], …"""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
