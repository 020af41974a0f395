"""One frozen base model, two modes: the teacher's velocity and the student's curve."""

# B batch, N tokens, C latent channels

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.flow.curve import Curve
from arcflow_jax.networks.conditioning import Conditioning, Guided
from arcflow_jax.networks.head import CurveHead, LegendreHead, MomentumHead, OutputLayer
from arcflow_jax.networks.layers import TEACHER, Adapter, Base, Mode, Remat, linear_layers
from arcflow_jax.networks.lora import attach_lora, merge_lora
from arcflow_jax.schema import Modes, Momentum, Rank, Scale, Share


class BackboneConfig(Protocol):
    """What shared code reads of a family's model config: width D, attention heads, and the 4C features of a token."""

    @property
    def width(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def in_channels(self) -> int: ...


class Backbone(Protocol):
    """A transformer up to its output norm."""

    config: BackboneConfig

    def __call__(
        self, tokens: jax.Array, sigma: jax.Array, conditioning: Conditioning, mode: Mode
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden image tokens [B, N, D] and the time embedding [B, D], of tokens [B, N, 4C] at σ [B]."""
        ...


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What distillation adds to a teacher. The defaults are the published ones.

    Attributes:
      modes: K, the number of modes of the momentum mixture, or of terms of the Legendre series. 1 is the linear
        student: one constant velocity per segment.
      rank: LoRA rank r.
      alpha: LoRA scale; the update is multiplied by alpha / rank. None is the rank, so that the update is not scaled.
      dropout: rate of LoRA dropout in training.
      targets: the linear layers of the backbone that get LoRA, as patterns (see `lora.attach_lora`). None stands for
        the model family's published ones (see `with_targets`).
      basis: the kind of curve, "momentum" (`momentum.Mixture`) or "legendre" (`legendre.Series`).
      initial_momenta: the first and last of the K − 1 log-spaced initial momenta e^g of a mixture.
    """

    modes: Modes = 16
    rank: Rank = 256
    alpha: Scale | None = None
    dropout: Share = 0.05
    targets: tuple[str, ...] | None = None
    basis: Literal["momentum", "legendre"] = "momentum"
    initial_momenta: tuple[Momentum, Momentum] = (0.2, 4.0)

    def __post_init__(self):
        schema.check(self)
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))

    def with_targets(self, published: tuple[str, ...]) -> AdapterConfig:
        """The same with a family's published targets where none are given."""
        return self if self.targets is not None else dataclasses.replace(self, targets=published)

    def head(self, width: int, out_channels: int, rngs: nnx.Rngs) -> CurveHead:
        """A new head that predicts these curves."""
        if self.basis == "legendre":
            return LegendreHead(width, out_channels, self.modes, rngs=rngs)
        return MomentumHead(width, out_channels, self.modes, self.initial_momenta, rngs=rngs)


class ArcModel(nnx.Module):
    """A teacher and, after `attach_student`, its student. They share the weights of the backbone.

    `Base` variables are the teacher's; `Adapter` variables are the student's own.

    Args:
      bias: whether the teacher's output layer has biases.
    """

    def __init__(self, backbone: Backbone, *, bias: bool = True, param_dtype: Any, rngs: nnx.Rngs):
        self.backbone = backbone
        config = backbone.config
        self.output = OutputLayer(config.width, config.in_channels, bias=bias, dtype=param_dtype, rngs=rngs)
        self.head: CurveHead | None = nnx.data(None)

    def attach_student(self, config: AdapterConfig, rngs: nnx.Rngs) -> ArcModel:
        """Adds the head and LoRA; `initialize_student` sets their values. Raises UserError like `lora.attach_lora`."""
        self.head = config.head(self.backbone.config.width, self.backbone.config.in_channels, rngs)
        attach_lora(self.backbone, config.targets, rank=config.rank, alpha=config.alpha, dropout=config.dropout)
        return self

    def initialize_student(self, key: jax.Array) -> None:
        """Sets the adapter to its initial values.

        The student's velocity is then the teacher's, plus the noise that makes the modes of a mixture differ.
        """
        lora_key, head_key = jax.random.split(key)
        for layer in linear_layers(self.backbone).values():
            if layer.lora is not None:
                layer.lora.initialize(lora_key)
        channels = self.backbone.config.in_channels // 4
        self.head.initialize_from(self.output, jax.random.normal(head_key, (self.head.modes, channels)))

    def teacher_velocity(self, tokens: jax.Array, sigma: jax.Array, conditioning: Conditioning | Guided) -> jax.Array:
        """The teacher's velocity dx/dσ of packed tokens [B, N, 4C] at σ [B]; [B, N, 4C] in float32.

        With classifier-free guidance if `conditioning` is `Guided`.
        """
        if isinstance(conditioning, Guided):
            return self._guided_velocity(tokens, sigma, conditioning)
        return self.output(*self.backbone(tokens, sigma, conditioning, TEACHER))

    def _guided_velocity(self, tokens: jax.Array, sigma: jax.Array, conditioning: Guided) -> jax.Array:
        """negative + scale · (positive − negative), with one call of the network.

        Positive and negative of an example are neighbours in the batch, so they stay on the same device if the batch
        is sharded.
        """
        pairs = conditioning.positive.paired(conditioning.negative)
        both = self.teacher_velocity(jnp.repeat(tokens, 2, axis=0), jnp.repeat(sigma, 2), pairs)
        positive, negative = jnp.moveaxis(both.reshape(len(tokens), 2, *tokens.shape[1:]), 1, 0)
        guided = negative + conditioning.scale * (positive - negative)
        if conditioning.norm_preserving:
            norms = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (positive, guided))
            guided = guided * jnp.divide(*norms)
        return guided

    def student_curve(
        self,
        tokens: jax.Array,
        sigma: jax.Array,
        conditioning: Conditioning,
        dropout_key: jax.Array | None = None,
        remat: Remat = "full",
    ) -> Curve:
        """The student's curve for the segment that starts at σ [B], from tokens [B, N, 4C].

        LoRA dropout is applied if a key is given; `remat` is for its gradient (see `Mode`).
        """
        mode = Mode(adapters=True, dropout_key=dropout_key, remat=remat)
        return self.head(*self.backbone(tokens, sigma, conditioning, mode))


def split_model(model: ArcModel) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph definition, frozen base model, trainable adapter); `nnx.merge` is the inverse."""
    return nnx.split(model, Base, Adapter)


def initial_adapter(graphdef: nnx.GraphDef, base: nnx.State, abstract: nnx.State, key: jax.Array) -> nnx.State:
    """The initial adapter, with the structure of `abstract`. Pure; call it under jit."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    model = nnx.merge(graphdef, base, zeros)
    model.initialize_student(key)
    return nnx.state(model, Adapter)


def merged_state(graphdef: nnx.GraphDef, base: nnx.State, adapter: nnx.State) -> nnx.State:
    """The state of a model with LoRA merged into its backbone: a student for sampling, and no longer a teacher.

    Pure; call it under jit. `merged_graphdef` is its graph definition.
    """
    copied = jax.tree.map(lambda x: x, (base, adapter))  # nnx.merge uses the variables of the states themselves
    model = nnx.merge(graphdef, *copied)
    merge_lora(model.backbone)
    return nnx.state(model)


def merged_graphdef(graphdef: nnx.GraphDef, base: nnx.State, adapter: nnx.State) -> nnx.GraphDef:
    """The graph definition of `merged_state`; the states may be abstract."""

    def merged(base: nnx.State, adapter: nnx.State) -> ArcModel:
        model = nnx.merge(graphdef, base, adapter)
        merge_lora(model.backbone)
        return model

    return nnx.graphdef(nnx.eval_shape(merged, base, adapter))
