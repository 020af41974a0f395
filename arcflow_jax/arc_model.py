"""One frozen base, two readings: the teacher's velocity and the student's momentum mixture."""

# B batch, N tokens, C latent channels

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax.layers import STUDENT, TEACHER, Adapter, Base, Reading
from arcflow_jax.lora import attach_lora
from arcflow_jax.models.head import MomentumHead, OutputLayer
from arcflow_jax.momentum import Mixture


class Trunk(Protocol):
    """A transformer up to its output norm."""

    config: Any  # with `width` and `in_channels`

    def __call__(
        self, tokens: jax.Array, sigma: jax.Array, conditioning: Any, reading: Reading
    ) -> tuple[jax.Array, jax.Array]: ...


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What distillation adds to a teacher.

    Attributes:
      modes: K, of the momentum mixture; 1 is a linear student, one constant velocity a segment.
      rank: LoRA rank r.
      alpha: LoRA scale; the update is multiplied by alpha / rank.
      dropout: rate of LoRA dropout in training.
      targets: the linear layers of the trunk that get LoRA, as patterns (see `lora.attach_lora`).
    """

    modes: int
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


class ArcModel(nnx.Module):
    """A teacher and its student, which share every weight of the trunk.

    `Base` variables are the teacher; `Adapter` variables are the student's own. Without an adapter config there is
    only the teacher.
    """

    def __init__(self, trunk: Trunk, adapter: AdapterConfig | None, *, param_dtype: Any, rngs: nnx.Rngs):
        width, channels = trunk.config.width, trunk.config.in_channels
        self.trunk = trunk
        self.output = OutputLayer(width, channels, dtype=param_dtype, rngs=rngs)
        self.head: MomentumHead | None = nnx.data(None)
        if adapter is not None:
            self.head = MomentumHead(width, channels, adapter.modes, rngs=rngs)
            attach_lora(
                trunk,
                adapter.targets,
                rank=adapter.rank,
                alpha=adapter.alpha,
                dropout=adapter.dropout,
                key=rngs.params(),
            )

    def teacher_velocity(self, tokens: jax.Array, sigma: jax.Array, conditioning: Any) -> jax.Array:
        """The teacher's velocity dx/dσ of packed tokens [B, N, 4C] at σ [B]; [B, N, 4C] in float32."""
        return self.output(*self.trunk(tokens, sigma, conditioning, TEACHER))

    def student_mixture(
        self, tokens: jax.Array, sigma: jax.Array, conditioning: Any, dropout_key: jax.Array | None = None
    ) -> Mixture:
        """The student's mixture for the segment that starts at σ [B], from tokens [B, N, 4C]; LoRA dropout by key."""
        reading = STUDENT if dropout_key is None else Reading(adapters=True, dropout_key=dropout_key)
        return self.head(*self.trunk(tokens, sigma, conditioning, reading))


def split(model: ArcModel) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(definition, frozen base, trainable adapter); `nnx.merge` puts them back together."""
    return nnx.split(model, Base, Adapter)


def start_adapter(model: ArcModel, key: jax.Array) -> None:
    """Sets the head from the teacher's own output layer; LoRA starts at zero effect by itself."""
    channels = model.trunk.config.in_channels // 4
    model.head.start_from(model.output, jax.random.normal(key, (model.head.modes, channels)))
