"""FLUX.2 [klein] base: a transformer of double and single blocks without guidance embedding, Qwen3 for text.

FLUX.2-dev's transformer and VAE are of the same classes, but its text encoder, Mistral, is not supported. The distilled
[klein] models are refused: they have no classifier-free guidance left, which the teacher needs.
"""

# B prompts, N image tokens, R tokens of reference images, T text tokens

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import ShapeDtypeStruct
from jax.sharding import Mesh
from PIL import Image

from arcflow_jax.convert.backbones import flux2, flux2_original
from arcflow_jax.convert.text import qwen3
from arcflow_jax.convert.vaes import flux2 as vae_flux2
from arcflow_jax.data.tokenizers import max_length
from arcflow_jax.errors import UserError
from arcflow_jax.families.family import Family, Network, ReferenceImages, takes_guidance
from arcflow_jax.families.latents import position_ids
from arcflow_jax.families.text import Model, PromptEncoder
from arcflow_jax.networks.backbones.flux2 import Flux2, Flux2Conditioning, Flux2Config
from arcflow_jax.networks.student import ArcModel
from arcflow_jax.networks.text.qwen3 import Qwen3Config, Qwen3Text
from arcflow_jax.networks.vaes.flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config
from arcflow_jax.parallel.mesh import batched, replicated, row_sharding


def teacher(config: Flux2Config, dtype: Any, rngs: nnx.Rngs) -> ArcModel:
    """FLUX.2's transformer, without a student."""
    backbone = Flux2(config, dtype=dtype, param_dtype=dtype, rngs=rngs)
    return ArcModel(backbone, bias=False, param_dtype=dtype, rngs=rngs)


FLUX2 = Network(
    "Flux2Transformer2DModel",
    Flux2Config,
    teacher,
    flux2,
    original=lambda config: flux2_original,
    kept=(
        *("backbone.x_embedder", "backbone.context_embedder", "backbone.time_guidance_embed.*", "output.*"),
        "backbone.*_modulation*",  # which all blocks share
    ),
)
QWEN3 = Network(
    "Qwen3ForCausalLM", Qwen3Config, lambda config, dtype, rngs: Qwen3Text(config, dtype=dtype, rngs=rngs), qwen3
)
VAE = Network(
    "AutoencoderKLFlux2",
    AutoencoderKLFlux2Config,
    lambda config, dtype, rngs: AutoencoderKLFlux2(config, dtype=dtype, rngs=rngs),
    vae_flux2,
)


class KleinPrompts(PromptEncoder):
    """Qwen3's hidden states of a prompt as the message of a user, whose answer begins without thinking."""

    # What the chat template in its tokenizer's folder makes of a prompt
    TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ENCODERS: ClassVar = {"text_encoder": "tokenizer"}

    def _embed(
        self, states: Mapping[str, nnx.State], prompts: Sequence[str]
    ) -> tuple[dict[str, jax.Array], np.ndarray]:
        encoder = self.encoders["text_encoder"]
        ids, cut = encoder.ids([self.TEMPLATE.format(prompt) for prompt in prompts])
        from_the_end = ids[:, ::-1] == encoder.tokenizer.pad_token_id
        padding = np.logical_and.accumulate(from_the_end, axis=1)[:, ::-1]
        self.cut += int(cut.sum())
        return {"text": encoder(states["text_encoder"], np.where(padding, ~ids, ids), self.mesh)}, cut

    @staticmethod
    def conditioning(
        model: Model, mesh: Mesh, embedded: Mapping[str, jax.Array], *, guidance: float, rows: int, columns: int
    ) -> Flux2Conditioning:
        batch = len(embedded["text"])
        scales = None
        if takes_guidance(model.config("transformer")):
            scales = jnp.full(batch, guidance, jnp.float32, device=row_sharding(mesh, batch))
        positions = jnp.pad(position_ids(rows, columns), ((0, 0), (0, 1)))
        return Flux2Conditioning(embedded["text"], scales, positions)

    @staticmethod
    def abstract_conditioning(model: Model, mesh: Mesh, batch: int, tokens: int, dtype: Any) -> Flux2Conditioning:
        split, config = batched(mesh), model.config("transformer")
        text = max_length(model.path / "tokenizer", KleinPrompts.MAX_TOKENS)
        return Flux2Conditioning(
            text=ShapeDtypeStruct((batch, text, config.joint_attention_dim), dtype, sharding=split),
            guidance=ShapeDtypeStruct((batch,), jnp.float32, sharding=split) if takes_guidance(config) else None,
            positions=ShapeDtypeStruct((tokens, 4), jnp.float32, sharding=replicated(mesh)),
        )


def log_shift(tokens: int, steps: int) -> float:
    """The logarithm of the teacher's timestep shift, fitted by FLUX.2's authors (diffusers' `compute_empirical_mu`).

    It is linear in the tokens for 200 steps, and again for 10; between and beyond, linear in the steps. Above 4300
    tokens it is that of 200 steps for any number.
    """
    of_200, of_10 = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
    return of_200 if tokens > 4300 else of_200 + (of_200 - of_10) * (steps - 200) / 190


LEAST_SIDE, MOST_RATIO, MOST_PIXELS = 64, 8, 1024**2  # of a reference image; larger ones are scaled down


def fitted(image: Image.Image, side: int) -> Image.Image:
    """A reference image as FLUX.2's pipeline in diffusers has it: scaled down to a megapixel if it has more, and
    cropped at its center to multiples of `side`. Raises UserError if it is too small or too long."""
    width, height = image.size
    if min(width, height) < LEAST_SIDE or max(width, height) > MOST_RATIO * min(width, height):
        raise UserError(
            f"a reference image is {height}x{width}, but has to have at least {LEAST_SIDE} pixels a side, and one "
            f"side at most {MOST_RATIO} times as long as the other"
        )
    if width * height > MOST_PIXELS:
        scale = math.sqrt(MOST_PIXELS / (width * height))
        width, height = int(width * scale), int(height * scale)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = width % side // 2, height % side // 2
    return image.crop((left, top, left + width // side * side, top + height // side * side))


def reference_positions(grids: Sequence[tuple[int, int]]) -> jax.Array:  # [R, 4]
    """(10 · i, row, column, 0) of each token of reference image i, counted from 1."""
    images = [position_ids(*grid).at[:, 0].set(10 * i) for i, grid in enumerate(grids, 1)]
    return jnp.pad(jnp.concatenate(images), ((0, 0), (0, 1)))


FAMILY = Family(
    pipeline="Flux2KleinPipeline",
    networks={"transformer": FLUX2, "text_encoder": QWEN3, "vae": VAE},
    prompts=KleinPrompts,
    lora_targets=(
        "single_transformer_blocks.attn.to_qkv_mlp_proj",
        "single_transformer_blocks.attn.to_out",
        "transformer_blocks.ff.*",
        "transformer_blocks.ff_context.*",
        "time_guidance_embed.timestep_embedder.*",
    ),
    log_shift=log_shift,
    references=ReferenceImages(4, fitted, reference_positions),
    settings={"is_distilled": False},
)
