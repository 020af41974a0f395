"""The record of a model family: everything that the rest of the library needs to know about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from arcflow_jax.families.text import PromptEncoder
from arcflow_jax.networks.student import AdapterConfig, ArcModel


@dataclasses.dataclass(frozen=True)
class Network:
    """A kind of network.

    Attributes:
      class_name: what `model_index.json` calls it.
      config: the dataclass of its config.json.
      build: makes it from (config, dtype, rngs).
      table: the rules of its checkpoints (see `convert.rules`).
      original: makes from a config the rules of the layout in which its authors publish it, if that is another.
    """

    class_name: str
    config: type
    build: Callable[[Any, Any, nnx.Rngs], nnx.Module]
    table: Any
    original: Callable[[Any], Any] | None = None

    def tables(self, config: Any) -> list[Any]:
        """The rules of all layouts in which its checkpoints occur."""
        return [self.table] if self.original is None else [self.table, self.original(config)]

    def abstract(self, config: Any, dtype: Any = jnp.float32) -> nnx.Module:
        """The network with shapes in place of arrays."""
        return nnx.eval_shape(lambda: self.build(config, dtype, nnx.Rngs(0)))

    def student(self, config: Any, adapter: AdapterConfig, dtype: Any) -> ArcModel:
        """A transformer with a student's head and LoRA, shapes in place of arrays."""

        def build() -> ArcModel:
            rngs = nnx.Rngs(0)
            return self.build(config, jnp.dtype(dtype), rngs).attach_student(adapter, rngs)

        return nnx.eval_shape(build)


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
      pipeline: its class in diffusers, which `model_index.json` names.
      networks: by component. `transformer` is the base that a student is trained on; `vae` decodes.
      prompts: turns prompts into conditioning.
      lora_targets: the linear layers of the backbone that the published recipe adapts (see `lora.attach_lora`).
      embedded_guidance: scale that the published pipeline feeds a guidance embedding.
      cfg_guidance: scale of classifier-free guidance, where that is used instead.
    """

    pipeline: str
    networks: Mapping[str, Network]
    prompts: type[PromptEncoder]
    lora_targets: tuple[str, ...]
    embedded_guidance: float = 3.5
    cfg_guidance: float = 4.0

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The tokenizers' folders, which a conversion copies."""
        return tuple(self.prompts.ENCODERS.values())

    def published_guidance(self, transformer: Any) -> float:
        """The scale that the published students were distilled at, for this config of the transformer."""
        return self.embedded_guidance if takes_guidance(transformer) else self.cfg_guidance


def takes_guidance(transformer: Any) -> bool:
    """Whether a transformer of this config has a guidance embedding."""
    return bool(getattr(transformer, "guidance_embeds", False))
