"""FLUX.1: a transformer of double and single blocks, T5 for text tokens, CLIP for the pooled vector, AutoencoderKL."""

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

from arcflow_jax.convert.backbones import flux, flux_original, flux_xlabs
from arcflow_jax.convert.text import clip, t5
from arcflow_jax.convert.vaes import kl as vae_kl
from arcflow_jax.data.tokenizers import max_length
from arcflow_jax.families.family import Family, Network, takes_guidance
from arcflow_jax.families.latents import position_ids
from arcflow_jax.families.text import Model, PromptEncoder
from arcflow_jax.networks.backbones.flux import Flux, FluxConditioning, FluxConfig
from arcflow_jax.networks.student import ArcModel
from arcflow_jax.networks.text.clip import CLIPTextConfig, CLIPTextEncoder
from arcflow_jax.networks.text.t5 import T5Config, T5Encoder
from arcflow_jax.networks.vaes.kl import AutoencoderKL, AutoencoderKLConfig
from arcflow_jax.parallel.mesh import batched, replicated, row_sharding


def teacher(config: FluxConfig, dtype: Any, rngs: nnx.Rngs) -> ArcModel:
    """FLUX.1's transformer, without a student."""
    return ArcModel(Flux(config, dtype=dtype, param_dtype=dtype, rngs=rngs), param_dtype=dtype, rngs=rngs)


FLUX = Network(
    "FluxTransformer2DModel",
    FluxConfig,
    teacher,
    flux,
    original=lambda config: flux_original,
    kept=("backbone.x_embedder", "backbone.context_embedder", "backbone.time_text_embed.*", "output.*"),
    lora_tables=(flux_xlabs,),
)
CLIP = Network(
    "CLIPTextModel", CLIPTextConfig, lambda config, dtype, rngs: CLIPTextEncoder(config, dtype=dtype, rngs=rngs), clip
)
T5 = Network("T5EncoderModel", T5Config, lambda config, dtype, rngs: T5Encoder(config, dtype=dtype, rngs=rngs), t5)
VAE = Network(
    "AutoencoderKL",
    AutoencoderKLConfig,
    lambda config, dtype, rngs: AutoencoderKL(config, dtype=dtype, rngs=rngs),
    vae_kl,
    original=lambda config: vae_kl.Original(len(config.block_out_channels)),
)


class FluxPrompts(PromptEncoder):
    """T5 for the text tokens, CLIP for the pooled vector.

    `cut` counts prompts that are too long for T5. Prompts longer than CLIP's 77 tokens are not counted: the pooled
    vector is only a summary, and T5 reads all of the prompt.
    """

    ENCODERS: ClassVar = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

    def _embed(
        self, states: Mapping[str, nnx.State], prompts: Sequence[str]
    ) -> tuple[dict[str, jax.Array], np.ndarray]:
        clip, t5 = self.encoders["text_encoder"], self.encoders["text_encoder_2"]
        _, pooled = clip(states["text_encoder"], clip.ids(prompts)[0], self.mesh)
        ids, cut = t5.ids(prompts)
        self.cut += int(cut.sum())
        return {"text": t5(states["text_encoder_2"], ids, self.mesh), "pooled": pooled}, cut

    @staticmethod
    def conditioning(
        model: Model, mesh: Mesh, embedded: Mapping[str, jax.Array], *, guidance: float, rows: int, columns: int
    ) -> FluxConditioning:
        batch = len(embedded["text"])
        scales = None
        if takes_guidance(model.config("transformer")):
            scales = jnp.full(batch, guidance, jnp.float32, device=row_sharding(mesh, batch))
        positions = jnp.asarray(position_ids(rows, columns))
        return FluxConditioning(embedded["text"], embedded["pooled"], scales, positions)

    @staticmethod
    def abstract_conditioning(model: Model, mesh: Mesh, batch: int, tokens: int, dtype: Any) -> FluxConditioning:
        split, config = batched(mesh), model.config("transformer")
        text = max_length(model.path / "tokenizer_2", FluxPrompts.MAX_TOKENS)
        return FluxConditioning(
            text=ShapeDtypeStruct((batch, text, config.joint_attention_dim), dtype, sharding=split),
            pooled=ShapeDtypeStruct((batch, config.pooled_projection_dim), dtype, sharding=split),
            guidance=ShapeDtypeStruct((batch,), jnp.float32, sharding=split) if takes_guidance(config) else None,
            positions=ShapeDtypeStruct((tokens, 3), jnp.float32, sharding=replicated(mesh)),
        )


FAMILY = Family(
    pipeline="FluxPipeline",
    networks={"transformer": FLUX, "text_encoder": CLIP, "text_encoder_2": T5, "vae": VAE},
    prompts=FluxPrompts,
    lora_targets=(
        "single_transformer_blocks.proj_mlp",
        "single_transformer_blocks.proj_out",
        "transformer_blocks.ff.*",
        "transformer_blocks.ff_context.*",
        "time_text_embed.timestep_embedder.*",
    ),
)
