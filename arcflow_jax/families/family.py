"""The record of a model family: all that the rest of the library knows about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from PIL import Image

from arcflow_jax.families.text import PromptEncoder
from arcflow_jax.networks import layers
from arcflow_jax.networks.kernel import Format
from arcflow_jax.networks.quantization import Quantization, chosen_layers, quantize_layers
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
      kept: the linear layers that quantization leaves as they are, as shell-style patterns.
      lora_tables: the rules of further layouts, which only files of style LoRAs have.
    """

    class_name: str
    config: type
    build: Callable[[Any, Any, nnx.Rngs], nnx.Module]
    table: Any
    original: Callable[[Any], Any] | None = None
    kept: tuple[str, ...] = ()
    lora_tables: tuple[Any, ...] = ()

    def tables(self, config: Any) -> list[Any]:
        """The rules of all layouts of its checkpoints."""
        return [self.table] if self.original is None else [self.table, self.original(config)]

    def abstract(self, config: Any, dtype: Any = jnp.float32, quantization: Quantization | None = None) -> nnx.Module:
        """The network with shapes in place of arrays. Raises UserError if the quantization does not fit."""
        return layers.abstract(lambda: self._quantized(config, dtype, quantization))

    def student(
        self, config: Any, adapter: AdapterConfig, dtype: Any, quantization: Quantization | None = None
    ) -> ArcModel:
        """A transformer with a student's head and LoRA, with shapes in place of arrays. Errors as for `abstract`."""
        return layers.abstract(
            lambda: self._quantized(config, jnp.dtype(dtype), quantization).attach_student(adapter, nnx.Rngs(0))
        )

    def _quantized(self, config: Any, dtype: Any, quantization: Quantization | None) -> Any:
        network = self.build(config, dtype, nnx.Rngs(0))
        quantize_layers(network, quantization)
        return network

    def quantization(self, config: Any, format: Format | None) -> Quantization | None:
        """What quantization to a format changes; None for None."""
        return None if format is None else chosen_layers(self.abstract(config), format, self.kept)


@dataclasses.dataclass(frozen=True)
class ReferenceImages:
    """How a family's transformer reads reference images.

    Attributes:
      most: how many there may be.
      fitted: resizes an RGB image to the one that is encoded. Its sides are multiples of `side`, a token's side in
        pixels. Raises UserError, which begins with "a reference image", if the image cannot be used.
      positions: from the (rows, columns) of each image, the positions of all tokens, image after image: [R, axes].
    """

    most: int
    fitted: Callable[[Image.Image, int], Image.Image]
    positions: Callable[[Sequence[tuple[int, int]]], jax.Array]


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
      log_shift: μ of (image tokens, Euler steps), where its pipeline computes it: the logarithm of the teacher's
        timestep shift, if the scheduler shifts dynamically (see `schedule.Scheduler.shift_for`).
      references: None if its transformer reads no reference images.
      settings: of the pipeline, in `model_index.json` beside its components; another value is refused.
    """

    pipeline: str
    networks: Mapping[str, Network]
    prompts: type[PromptEncoder]
    lora_targets: tuple[str, ...]
    embedded_guidance: float = 3.5
    cfg_guidance: float = 4.0
    log_shift: Callable[[int, int], float] | None = None
    references: ReferenceImages | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
