"""What a velocity depends on besides the state and σ: the protocol of conditioning, reference images, and
classifier-free guidance.

Each family has its own conditioning, a pytree (`FluxConditioning` of `networks.backbones.flux`, …). Shared code knows
this protocol only.
"""

# B batch, N image tokens, R tokens of reference images, C latent channels

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp


class Conditioning(Protocol):
    """The conditioning of B examples: a dataclass and pytree of arrays with a leading batch dimension. Arrays that are
    called `positions` have none: the batch shares them.

    That of a family that reads reference images has a field `references`, see `References`.

    Attributes:
      positions: position of each image token, [N, axes].
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class References:
    """The reference images of B examples, which a transformer reads beside the state: a pytree.

    Attributes:
      tokens: latents without noise of all of an example's images, one after another, [B, R, 4C].
      positions: of each of these tokens, [R, axes]; shared by the batch.
    """

    tokens: jax.Array
    positions: jax.Array

    def repeat(self, times: int) -> References:
        """Those of each example `times` times in a row."""
        return References(jnp.repeat(self.tokens, times, axis=0), self.positions)


def repeated(references: References | None, times: int) -> References | None:
    """`References.repeat`, where there are any."""
    return None if references is None else references.repeat(times)


def beside_references(
    tokens: jax.Array, positions: jax.Array, references: References | None
) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, N + R, 4C] of a state and, after it, its references; and their positions [N + R, axes]."""
    if references is None:
        return tokens, positions
    tokens = jnp.concatenate([tokens, references.tokens.astype(tokens.dtype)], axis=1)
    return tokens, jnp.concatenate([positions, references.positions])


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


def referring(conditioning: Conditioning | Guided, references: References) -> Any:
    """The same conditioning with reference images. With guidance, prompt and negative prompt both have them."""
    if isinstance(conditioning, Guided):
        return dataclasses.replace(conditioning, positive=referring(conditioning.positive, references))
    return dataclasses.replace(conditioning, references=references)  # ty: ignore[invalid-argument-type]


def interleave(first: jax.Array, second: jax.Array) -> jax.Array:  # [B, ..] twice -> [2B, ..]
    """The examples of two batches in turn: first[0], second[0], first[1], …"""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
