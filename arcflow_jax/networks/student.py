"""One frozen base, two readings: the teacher's velocity and the student's curve."""

# B batch, N tokens, C latent channels

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax.errors import UserError
from arcflow_jax.flow.curve import Curve
from arcflow_jax.networks.conditioning import Conditioning, Guided
from arcflow_jax.networks.head import CurveHead, LegendreHead, MomentumHead, OutputLayer
from arcflow_jax.networks.layers import STUDENT, TEACHER, Adapter, Base, Mode
from arcflow_jax.networks.lora import attach_lora, linear_layers, merge_lora


class Backbone(Protocol):
    """A transformer up to its output norm."""

    config: Any  # with `width` and `in_channels`

    def __call__(
        self, tokens: jax.Array, sigma: jax.Array, conditioning: Conditioning, mode: Mode
    ) -> tuple[jax.Array, jax.Array]: ...


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What distillation adds to a teacher. The defaults are the published ones.

    Attributes:
      modes: K, of the momentum mixture, or terms of the Legendre series; 1 is a linear student, one constant velocity a
        segment.
      rank: LoRA rank r.
      alpha: LoRA scale; the update is multiplied by alpha / rank. None is the rank, so that the update is not scaled.
      dropout: rate of LoRA dropout in training.
      targets: the linear layers of the backbone that get LoRA, as patterns (see `lora.attach_lora`). None stands for
        the model family's published ones (see `with_targets`).
      basis: of the student's curves, "momentum" (`momentum.Mixture`) or "legendre" (`legendre.Series`).
      initial_momenta: the first and last of K − 1 log-spaced values that a mixture's momenta e^g start from.
    """

    modes: int = 16
    rank: int = 256
    alpha: float | None = None
    dropout: float = 0.05
    targets: tuple[str, ...] | None = None
    basis: str = "momentum"
    initial_momenta: tuple[float, float] = (0.2, 4.0)

    def __post_init__(self):
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        if self.modes < 1:
            raise UserError(f"modes is {self.modes}, but has to be at least 1")
        if self.basis not in ("momentum", "legendre"):
            raise UserError(f"basis is {self.basis!r}, but has to be 'momentum' or 'legendre'")
        if len(self.initial_momenta) != 2 or min(self.initial_momenta) <= 0:
            raise UserError(f"initial_momenta is {self.initial_momenta}, but has to be two numbers above 0")

    def with_targets(self, published: tuple[str, ...]) -> AdapterConfig:
        """The same with a family's published targets where none are given."""
        return self if self.targets is not None else dataclasses.replace(self, targets=published)

    def head(self, width: int, out_channels: int, rngs: nnx.Rngs) -> CurveHead:
        """The head that predicts such curves."""
        if self.basis == "legendre":
            return LegendreHead(width, out_channels, self.modes, rngs=rngs)
        return MomentumHead(width, out_channels, self.modes, self.initial_momenta, rngs=rngs)


class ArcModel(nnx.Module):
    """A teacher and, once `attach_student` has been called, its student, who share every weight of the backbone.

    `Base` variables are the teacher; `Adapter` variables are the student's own.
    """

    def __init__(self, backbone: Backbone, *, param_dtype: Any, rngs: nnx.Rngs):
        self.backbone = backbone
        self.output = OutputLayer(backbone.config.width, backbone.config.in_channels, dtype=param_dtype, rngs=rngs)
        self.head: CurveHead | None = nnx.data(None)

    def attach_student(self, config: AdapterConfig, rngs: nnx.Rngs) -> ArcModel:
        """Adds head and LoRA, whose values `initialize_student` sets. Raises UserError as `lora.attach_lora`."""
        self.head = config.head(self.backbone.config.width, self.backbone.config.in_channels, rngs)
        attach_lora(self.backbone, config.targets, rank=config.rank, alpha=config.alpha, dropout=config.dropout)
        return self

    def initialize_student(self, key: jax.Array) -> None:
        """Sets the adapter to where distillation begins: the student's velocity is the teacher's, but for the noise
        that tells the modes of a mixture apart."""
        lora_key, head_key = jax.random.split(key)
        for layer in linear_layers(self.backbone).values():
            if layer.lora is not None:
                layer.lora.initialize(lora_key)
        channels = self.backbone.config.in_channels // 4
        self.head.initialize_from(self.output, jax.random.normal(head_key, (self.head.modes, channels)))

    def teacher_velocity(self, tokens: jax.Array, sigma: jax.Array, conditioning: Conditioning | Guided) -> jax.Array:
        """The teacher's velocity dx/dσ of packed tokens [B, N, 4C] at σ [B]; [B, N, 4C] in float32.

        Under classifier-free guidance where `conditioning` is `Guided`.
        """
        if isinstance(conditioning, Guided):
            return self._guided_velocity(tokens, sigma, conditioning)
        return self.output(*self.backbone(tokens, sigma, conditioning, TEACHER))

    def _guided_velocity(self, tokens: jax.Array, sigma: jax.Array, conditioning: Guided) -> jax.Array:
        """negative + scale · (positive − negative), in one call.

        An example and its negative are neighbours in the batch, so that on a batch that is split over devices it
        stays on its device.
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
        self, tokens: jax.Array, sigma: jax.Array, conditioning: Conditioning, dropout_key: jax.Array | None = None
    ) -> Curve:
        """The student's curve for the segment that starts at σ [B], from tokens [B, N, 4C]; LoRA dropout by key."""
        mode = STUDENT if dropout_key is None else Mode(adapters=True, dropout_key=dropout_key)
        return self.head(*self.backbone(tokens, sigma, conditioning, mode))


def split_model(model: ArcModel) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(definition, frozen base, trainable adapter); `nnx.merge` puts them back together."""
    return nnx.split(model, Base, Adapter)


def initial_adapter(graphdef: nnx.GraphDef, base: nnx.State, abstract: nnx.State, key: jax.Array) -> nnx.State:
    """The adapter with which distillation begins; `abstract` gives its structure. Pure, to be jitted."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    model = nnx.merge(graphdef, base, zeros)
    model.initialize_student(key)
    return nnx.state(model, Adapter)


def merged_state(graphdef: nnx.GraphDef, base: nnx.State, adapter: nnx.State) -> nnx.State:
    """The state of a model whose LoRA is folded into its backbone: a student for sampling, no longer a teacher.

    Pure, to be jitted; `merged_graphdef` is the definition that goes with it.
    """
    copied = jax.tree.map(lambda x: x, (base, adapter))  # the variables of a merged model are the states' own
    model = nnx.merge(graphdef, *copied)
    merge_lora(model.backbone)
    return nnx.state(model)


def merged_graphdef(graphdef: nnx.GraphDef, base: nnx.State, adapter: nnx.State) -> nnx.GraphDef:
    """The definition that `merged_state`'s state belongs to; states may be abstract."""

    def merged(base: nnx.State, adapter: nnx.State) -> ArcModel:
        model = nnx.merge(graphdef, base, adapter)
        merge_lora(model.backbone)
        return model

    return nnx.graphdef(nnx.eval_shape(merged, base, adapter))
