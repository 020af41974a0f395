"""FLUX.1's transformer as its authors publish it, in a single file (flux1-dev.safetensors).

It has other names than diffusers' layout. Query, key and value are one fused matrix, in the single blocks together with
the input of the MLP. In the last layer shift comes before scale.
"""

from arcflow_jax.convert.rules import SWAPPED, SWAPPED_LINEAR, Rule, fused, linear

DOUBLE, SINGLE = "double_blocks.{layer}", "single_blocks.{layer}"
OUR_DOUBLE, OUR_SINGLE = "backbone.transformer_blocks", "backbone.single_transformer_blocks"

RULES: tuple[Rule, ...] = (
    *linear("img_in", "backbone.x_embedder"),
    *linear("txt_in", "backbone.context_embedder"),
    *linear("time_in.in_layer", "backbone.time_text_embed.timestep_embedder.linear_1"),
    *linear("time_in.out_layer", "backbone.time_text_embed.timestep_embedder.linear_2"),
    *linear("guidance_in.in_layer", "backbone.time_text_embed.guidance_embedder.linear_1"),
    *linear("guidance_in.out_layer", "backbone.time_text_embed.guidance_embedder.linear_2"),
    *linear("vector_in.in_layer", "backbone.time_text_embed.text_embedder.linear_1"),
    *linear("vector_in.out_layer", "backbone.time_text_embed.text_embedder.linear_2"),
    # double blocks
    *linear(f"{DOUBLE}.img_mod.lin", f"{OUR_DOUBLE}.norm1.linear"),
    *linear(f"{DOUBLE}.txt_mod.lin", f"{OUR_DOUBLE}.norm1_context.linear"),
    *fused(f"{DOUBLE}.img_attn.qkv", f"{OUR_DOUBLE}.attn.to_q", f"{OUR_DOUBLE}.attn.to_k", f"{OUR_DOUBLE}.attn.to_v"),
    *linear(f"{DOUBLE}.img_attn.proj", f"{OUR_DOUBLE}.attn.to_out"),
    *fused(
        f"{DOUBLE}.txt_attn.qkv",
        f"{OUR_DOUBLE}.attn.add_q_proj",
        f"{OUR_DOUBLE}.attn.add_k_proj",
        f"{OUR_DOUBLE}.attn.add_v_proj",
    ),
    *linear(f"{DOUBLE}.txt_attn.proj", f"{OUR_DOUBLE}.attn.to_add_out"),
    Rule(f"{DOUBLE}.img_attn.norm.query_norm.scale", f"{OUR_DOUBLE}.attn.norm_q.scale"),
    Rule(f"{DOUBLE}.img_attn.norm.key_norm.scale", f"{OUR_DOUBLE}.attn.norm_k.scale"),
    Rule(f"{DOUBLE}.txt_attn.norm.query_norm.scale", f"{OUR_DOUBLE}.attn.norm_added_q.scale"),
    Rule(f"{DOUBLE}.txt_attn.norm.key_norm.scale", f"{OUR_DOUBLE}.attn.norm_added_k.scale"),
    *linear(f"{DOUBLE}.img_mlp.0", f"{OUR_DOUBLE}.ff.proj_in"),
    *linear(f"{DOUBLE}.img_mlp.2", f"{OUR_DOUBLE}.ff.proj_out"),
    *linear(f"{DOUBLE}.txt_mlp.0", f"{OUR_DOUBLE}.ff_context.proj_in"),
    *linear(f"{DOUBLE}.txt_mlp.2", f"{OUR_DOUBLE}.ff_context.proj_out"),
    # single blocks
    *linear(f"{SINGLE}.modulation.lin", f"{OUR_SINGLE}.norm.linear"),
    *fused(
        f"{SINGLE}.linear1",
        f"{OUR_SINGLE}.attn.to_q",
        f"{OUR_SINGLE}.attn.to_k",
        f"{OUR_SINGLE}.attn.to_v",
        f"{OUR_SINGLE}.proj_mlp",
    ),
    Rule(f"{SINGLE}.norm.query_norm.scale", f"{OUR_SINGLE}.attn.norm_q.scale"),
    Rule(f"{SINGLE}.norm.key_norm.scale", f"{OUR_SINGLE}.attn.norm_k.scale"),
    *linear(f"{SINGLE}.linear2", f"{OUR_SINGLE}.proj_out"),
    # output layer
    Rule("final_layer.adaLN_modulation.1.weight", "output.norm_out.linear.kernel", SWAPPED_LINEAR),
    Rule("final_layer.adaLN_modulation.1.bias", "output.norm_out.linear.bias", SWAPPED),
    *linear("final_layer.linear", "output.proj_out"),
)

# Files saved by other programs may have this prefix
ALIASES = {"model.diffusion_model": ""}
