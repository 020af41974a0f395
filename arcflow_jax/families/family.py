"""The record of a model family: all that the rest of the library knows about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from arcflow_jax.families.text import PromptEncoder
from arcflow_jax.networks import layers
from arcflow_jax.networks.student import AdapterConfig, ArcModel


@dataclasses.dataclass(frozen=True)
class Network:
    """A kind of network.

    Attributes:
      class_name: its class in `model_index.json`.
      config: the dataclass of its config.json (see `schema.parse`).
      build: makes the network from (config, dtype, rngs).
      table: the rules of its checkpoints (see `convert.rules`).
      original: makes, from a config, the rules of the layout of the model's authors, if that is another.
    """

    class_name: str
    config: type
    build: Callable[[Any, Any, nnx.Rngs], nnx.Module]
    table: Any
    original: Callable[[Any], Any] | None = None

    def tables(self, config: Any) -> list[Any]:
        """The rules of all layouts of its checkpoints."""
        return [self.table] if self.original is None else [self.table, self.original(config)]

    def abstract(self, config: Any, dtype: Any = jnp.float32) -> nnx.Module:
        """The network with shapes in place of arrays."""
        return layers.abstract(lambda: self.build(config, dtype, nnx.Rngs(0)))

    def student(self, config: Any, adapter: AdapterConfig, dtype: Any) -> ArcModel:
        """A transformer with a student's head and LoRA, with shapes in place of arrays."""

        def build() -> ArcModel:
            rngs = nnx.Rngs(0)
            return self.build(config, jnp.dtype(dtype), rngs).attach_student(adapter, rngs)

        return layers.abstract(build)


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
      pipeline: its pipeline's class in diffusers, as in `model_index.json`.
      networks: component → kind of network. `transformer` is the base that a student is trained on, and builds an
        `ArcModel`. `vae` is a `networks.vaes.vae.VAE`.
      prompts: turns prompts into conditioning.
      lora_targets: the backbone's linear layers that get LoRA in the published recipe (see `lora.attach_lora`).
      embedded_guidance: default guidance scale of a transformer with a guidance embedding.
      cfg_guidance: default scale of classifier-free guidance.
    """

    pipeline: str
    networks: Mapping[str, Network]
    prompts: type[PromptEncoder]
    lora_targets: tuple[str, ...]
    embedded_guidance: float = 3.5
    cfg_guidance: float = 4.0

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The tokenizers' folders, which the converter copies."""
        return tuple(self.prompts.ENCODERS.values())

    def published_guidance(self, transformer: Any) -> float:
        """The teacher guidance scale of the published students, for this config of the transformer."""
        return self.embedded_guidance if takes_guidance(transformer) else self.cfg_guidance


def takes_guidance(transformer: Any) -> bool:
    """Whether a transformer with this config has a guidance embedding."""
    return bool(getattr(transformer, "guidance_embeds", False))
