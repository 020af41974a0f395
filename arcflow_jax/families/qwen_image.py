"""Qwen-Image: a transformer of double blocks without guidance embedding, Qwen2.5-VL for text, a causal video VAE."""

# B prompts, N image tokens, T text tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import ShapeDtypeStruct
from jax.sharding import Mesh

from arcflow_jax.convert.backbones import qwen_image
from arcflow_jax.convert.text import qwen2_5_vl
from arcflow_jax.convert.vaes import qwen as vae_qwen
from arcflow_jax.data.tokenizers import max_length
from arcflow_jax.errors import UserError
from arcflow_jax.families.family import Family, Network
from arcflow_jax.families.latents import centred_positions
from arcflow_jax.families.text import Model, PromptEncoder
from arcflow_jax.networks.backbones.qwen_image import QwenImage, QwenImageConditioning, QwenImageConfig
from arcflow_jax.networks.student import ArcModel
from arcflow_jax.networks.text.qwen2_5_vl import Qwen2_5VLConfig, Qwen2_5VLText
from arcflow_jax.networks.vaes.qwen import AutoencoderKLQwenImage, AutoencoderKLQwenImageConfig
from arcflow_jax.parallel.mesh import batched, replicated
from arcflow_jax.parallel.offload import Offload
from arcflow_jax.parallel.processes import from_rows


def teacher(config: QwenImageConfig, dtype: Any, rngs: nnx.Rngs) -> ArcModel:
    """Qwen-Image's transformer, without a student."""
    return ArcModel(QwenImage(config, dtype=dtype, param_dtype=dtype, rngs=rngs), param_dtype=dtype, rngs=rngs)


QWEN_IMAGE = Network(
    "QwenImageTransformer2DModel",
    QwenImageConfig,
    teacher,
    qwen_image,
    kept=("backbone.img_in", "backbone.txt_in", "backbone.time_text_embed.*", "output.*"),
)
QWEN2_5_VL = Network(
    "Qwen2_5_VLForConditionalGeneration",
    Qwen2_5VLConfig,
    lambda config, dtype, rngs: Qwen2_5VLText(config, dtype=dtype, rngs=rngs),
    qwen2_5_vl,
)
VAE = Network(
    "AutoencoderKLQwenImage",
    AutoencoderKLQwenImageConfig,
    lambda config, dtype, rngs: AutoencoderKLQwenImage(config, dtype=dtype, rngs=rngs),
    vae_qwen,
)


class QwenPrompts(PromptEncoder):
    """Qwen2.5-VL's hidden states of a prompt inside a template, which asks for the description of an image.

    Raises:
      UserError: if the tokenizer's maximum leaves no room for a prompt in the template.
    """

    TEMPLATE = (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    BEFORE = 34  # tokens of the template before the prompt; their states are dropped
    TOKENS = 512  # of a prompt and the template after it, as in the training of the published students

    ENCODERS: ClassVar = {"text_encoder": "tokenizer"}
    MAX_TOKENS = BEFORE + TOKENS

    def __init__(self, model: Model, dtype: Any, mesh: Mesh, offload: Offload | None = None):
        length = max_length(model.path / "tokenizer", self.MAX_TOKENS)
        if length <= self.BEFORE:
            raise UserError(
                f"{model.path / 'tokenizer'}: model_max_length is {length}, but the template around a prompt alone "
                f"has more than {self.BEFORE} tokens"
            )
        super().__init__(model, dtype, mesh, offload)

    def _embed(
        self, states: Mapping[str, nnx.State], prompts: Sequence[str]
    ) -> tuple[dict[str, jax.Array], np.ndarray]:
        encoder = self.encoders["text_encoder"]
        ids, cut = encoder.ids([self.TEMPLATE.format(prompt) for prompt in prompts])
        padding = ids[:, ::-1] == encoder.tokenizer.pad_token_id  # from the end
        lengths = ids.shape[1] - self.BEFORE - np.argmin(padding, axis=1)
        text = encoder(states["text_encoder"], ids, self.mesh)[:, self.BEFORE :]
        self.cut += int(cut.sum())
        return {"text": text, "lengths": from_rows(lengths.astype(np.int32), self.mesh)}, cut

    @staticmethod
    def conditioning(
        model: Model, mesh: Mesh, embedded: Mapping[str, jax.Array], *, guidance: float, rows: int, columns: int
    ) -> QwenImageConditioning:
        positions = jnp.asarray(centred_positions(rows, columns))
        return QwenImageConditioning(embedded["text"], embedded["lengths"], positions)

    @staticmethod
    def abstract_conditioning(model: Model, mesh: Mesh, batch: int, tokens: int, dtype: Any) -> QwenImageConditioning:
        split, config = batched(mesh), model.config("transformer")
        text = max_length(model.path / "tokenizer", QwenPrompts.MAX_TOKENS) - QwenPrompts.BEFORE
        return QwenImageConditioning(
            text=ShapeDtypeStruct((batch, text, config.joint_attention_dim), dtype, sharding=split),
            lengths=ShapeDtypeStruct((batch,), jnp.int32, sharding=split),
            positions=ShapeDtypeStruct((tokens, 3), jnp.float32, sharding=replicated(mesh)),
        )


FAMILY = Family(
    pipeline="QwenImagePipeline",
    networks={"transformer": QWEN_IMAGE, "text_encoder": QWEN2_5_VL, "vae": VAE},
    prompts=QwenPrompts,
    lora_targets=(
        "transformer_blocks.img_mlp.*",
        "transformer_blocks.txt_mlp.*",
        "last_block.*.img_mlp.*",
        "time_text_embed.timestep_embedder.*",
    ),
)
