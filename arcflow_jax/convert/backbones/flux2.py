"""FLUX.2's transformer: diffusers' Flux2Transformer2DModel ↔ `networks.backbones.flux2` and `output`.

A model without guidance embedding has no targets for the rules of `guidance_embedder`; they are not used then.
"""

from arcflow_jax.convert.rules import Rule, grouped, kernel
from arcflow_jax.networks.backbones.flux2 import GROUP, MLP

# Layers of several parts, see networks.backbones.flux2
MLP_IN, MLP_OUT = grouped(GROUP, outputs=2 * MLP), grouped(GROUP, inputs=MLP)
SINGLE_IN, SINGLE_OUT = grouped(GROUP, outputs=3 + 2 * MLP), grouped(GROUP, inputs=1 + MLP)

DOUBLE, SINGLE = "transformer_blocks.{layer}", "single_transformer_blocks.{layer}"


def attention(name: str) -> Rule:
    return kernel(f"{DOUBLE}.attn.{name}", f"backbone.transformer_blocks.attn.{name}")


def same(name: str) -> Rule:
    """The rule of a linear layer that is no block's, and has the same name here."""
    return kernel(name, f"backbone.{name}")


RULES: tuple[Rule, ...] = (
    same("x_embedder"),
    same("context_embedder"),
    same("time_guidance_embed.timestep_embedder.linear_1"),
    same("time_guidance_embed.timestep_embedder.linear_2"),
    same("time_guidance_embed.guidance_embedder.linear_1"),
    same("time_guidance_embed.guidance_embedder.linear_2"),
    same("double_stream_modulation_img.linear"),
    same("double_stream_modulation_txt.linear"),
    same("single_stream_modulation.linear"),
    # double blocks
    attention("to_q"),
    attention("to_k"),
    attention("to_v"),
    kernel(f"{DOUBLE}.attn.to_out.0", "backbone.transformer_blocks.attn.to_out"),
    attention("add_q_proj"),
    attention("add_k_proj"),
    attention("add_v_proj"),
    attention("to_add_out"),
    Rule(f"{DOUBLE}.attn.norm_q.weight", "backbone.transformer_blocks.attn.norm_q.scale"),
    Rule(f"{DOUBLE}.attn.norm_k.weight", "backbone.transformer_blocks.attn.norm_k.scale"),
    Rule(f"{DOUBLE}.attn.norm_added_q.weight", "backbone.transformer_blocks.attn.norm_added_q.scale"),
    Rule(f"{DOUBLE}.attn.norm_added_k.weight", "backbone.transformer_blocks.attn.norm_added_k.scale"),
    kernel(f"{DOUBLE}.ff.linear_in", "backbone.transformer_blocks.ff.linear_in", MLP_IN),
    kernel(f"{DOUBLE}.ff.linear_out", "backbone.transformer_blocks.ff.linear_out", MLP_OUT),
    kernel(f"{DOUBLE}.ff_context.linear_in", "backbone.transformer_blocks.ff_context.linear_in", MLP_IN),
    kernel(f"{DOUBLE}.ff_context.linear_out", "backbone.transformer_blocks.ff_context.linear_out", MLP_OUT),
    # single blocks
    kernel(f"{SINGLE}.attn.to_qkv_mlp_proj", "backbone.single_transformer_blocks.attn.to_qkv_mlp_proj", SINGLE_IN),
    kernel(f"{SINGLE}.attn.to_out", "backbone.single_transformer_blocks.attn.to_out", SINGLE_OUT),
    Rule(f"{SINGLE}.attn.norm_q.weight", "backbone.single_transformer_blocks.attn.norm_q.scale"),
    Rule(f"{SINGLE}.attn.norm_k.weight", "backbone.single_transformer_blocks.attn.norm_k.scale"),
    # output layer
    kernel("norm_out.linear", "output.norm_out.linear"),
    kernel("proj_out", "output.proj_out"),
)
