"""The networks that a pipeline is made of, under their names in its `model_index.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from flax import nnx

from arcflow_jax.arc_model import AdapterConfig, ArcModel
from arcflow_jax.convert import (
    autoencoder_kl,
    autoencoder_kl_qwen,
    clip,
    flux,
    flux_original,
    qwen2_5_vl,
    qwen_image,
    t5,
)
from arcflow_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from arcflow_jax.models.autoencoder_kl_qwen import AutoencoderKLQwenImage, AutoencoderKLQwenImageConfig
from arcflow_jax.models.clip import CLIPTextConfig, CLIPTextEncoder
from arcflow_jax.models.flux import Flux, FluxConfig
from arcflow_jax.models.qwen2_5_vl import Qwen2_5VLConfig, Qwen2_5VLText
from arcflow_jax.models.qwen_image import QwenImage, QwenImageConfig
from arcflow_jax.models.t5 import T5Config, T5Encoder


@dataclasses.dataclass(frozen=True)
class Network:
    """A kind of network.

    Attributes:
      class_name: what `model_index.json` calls it.
      geometry: the dataclass of its config.json.
      build: makes it from (geometry, dtype, rngs).
      table: the rules of its checkpoints.
      original: makes from a geometry the rules of the layout in which its authors publish it, if that is another.
    """

    class_name: str
    geometry: type
    build: Callable[[Any, Any, nnx.Rngs], nnx.Module]
    table: ModuleType
    original: Callable[[Any], Any] | None = None

    def tables(self, geometry: Any) -> list[Any]:
        """The rules of all layouts in which its checkpoints occur."""
        return [self.table] if self.original is None else [self.table, self.original(geometry)]

    def abstract(self, geometry: Any, dtype: Any = jnp.float32) -> nnx.Module:
        """The network with shapes in place of arrays."""
        return nnx.eval_shape(lambda: self.build(geometry, dtype, nnx.Rngs(0)))

    def student(self, geometry: Any, adapter: AdapterConfig, dtype: Any) -> ArcModel:
        """A transformer with a student's head and LoRA, shapes in place of arrays."""

        def build() -> ArcModel:
            rngs = nnx.Rngs(0)
            return self.build(geometry, jnp.dtype(dtype), rngs).attach_student(adapter, rngs)

        return nnx.eval_shape(build)


def flux_teacher(config: FluxConfig, dtype: Any, rngs: nnx.Rngs) -> ArcModel:
    trunk = Flux(config, dtype=dtype, param_dtype=dtype, rngs=rngs)
    return ArcModel(trunk, param_dtype=dtype, rngs=rngs)


FLUX = Network("FluxTransformer2DModel", FluxConfig, flux_teacher, flux, original=lambda config: flux_original)
CLIP = Network(
    "CLIPTextModel", CLIPTextConfig, lambda config, dtype, rngs: CLIPTextEncoder(config, dtype=dtype, rngs=rngs), clip
)
T5 = Network("T5EncoderModel", T5Config, lambda config, dtype, rngs: T5Encoder(config, dtype=dtype, rngs=rngs), t5)
VAE = Network(
    "AutoencoderKL",
    AutoencoderKLConfig,
    lambda config, dtype, rngs: AutoencoderKL(config, dtype=dtype, rngs=rngs),
    autoencoder_kl,
    original=lambda config: autoencoder_kl.Original(len(config.block_out_channels)),
)


def qwen_image_teacher(config: QwenImageConfig, dtype: Any, rngs: nnx.Rngs) -> ArcModel:
    trunk = QwenImage(config, dtype=dtype, param_dtype=dtype, rngs=rngs)
    return ArcModel(trunk, param_dtype=dtype, rngs=rngs)


QWEN_IMAGE = Network("QwenImageTransformer2DModel", QwenImageConfig, qwen_image_teacher, qwen_image)
QWEN2_5_VL = Network(
    "Qwen2_5_VLForConditionalGeneration",
    Qwen2_5VLConfig,
    lambda config, dtype, rngs: Qwen2_5VLText(config, dtype=dtype, rngs=rngs),
    qwen2_5_vl,
)
QWEN_VAE = Network(
    "AutoencoderKLQwenImage",
    AutoencoderKLQwenImageConfig,
    lambda config, dtype, rngs: AutoencoderKLQwenImage(config, dtype=dtype, rngs=rngs),
    autoencoder_kl_qwen,
)

# pipeline → component → network. `transformer` is the one that a student is trained on.
PIPELINES: dict[str, dict[str, Network]] = {
    "FluxPipeline": {"transformer": FLUX, "text_encoder": CLIP, "text_encoder_2": T5, "vae": VAE},
    "QwenImagePipeline": {"transformer": QWEN_IMAGE, "text_encoder": QWEN2_5_VL, "vae": QWEN_VAE},
}
TRANSFORMERS = {pipeline["transformer"].class_name: pipeline["transformer"] for pipeline in PIPELINES.values()}
# pipeline → folders, which are copied as they are
TOKENIZERS = {"FluxPipeline": ("tokenizer", "tokenizer_2"), "QwenImagePipeline": ("tokenizer",)}
