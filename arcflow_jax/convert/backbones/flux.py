"""FLUX.1's transformer: diffusers' FluxTransformer2DModel ↔ `networks.backbones.flux` and `output`.

A model without guidance embedding has no targets for the rules of `guidance_embedder`; they are not used then.
"""

from arcflow_jax.convert.rules import Rule, linear

DOUBLE, SINGLE = "transformer_blocks.{layer}", "single_transformer_blocks.{layer}"
OUR_DOUBLE, OUR_SINGLE = "backbone.transformer_blocks", "backbone.single_transformer_blocks"

RULES: tuple[Rule, ...] = (
    *linear("x_embedder", "backbone.x_embedder"),
    *linear("context_embedder", "backbone.context_embedder"),
    *linear("time_text_embed.timestep_embedder.linear_1", "backbone.time_text_embed.timestep_embedder.linear_1"),
    *linear("time_text_embed.timestep_embedder.linear_2", "backbone.time_text_embed.timestep_embedder.linear_2"),
    *linear("time_text_embed.guidance_embedder.linear_1", "backbone.time_text_embed.guidance_embedder.linear_1"),
    *linear("time_text_embed.guidance_embedder.linear_2", "backbone.time_text_embed.guidance_embedder.linear_2"),
    *linear("time_text_embed.text_embedder.linear_1", "backbone.time_text_embed.text_embedder.linear_1"),
    *linear("time_text_embed.text_embedder.linear_2", "backbone.time_text_embed.text_embedder.linear_2"),
    # double blocks
    *linear(f"{DOUBLE}.norm1.linear", f"{OUR_DOUBLE}.norm1.linear"),
    *linear(f"{DOUBLE}.norm1_context.linear", f"{OUR_DOUBLE}.norm1_context.linear"),
    *linear(f"{DOUBLE}.attn.to_q", f"{OUR_DOUBLE}.attn.to_q"),
    *linear(f"{DOUBLE}.attn.to_k", f"{OUR_DOUBLE}.attn.to_k"),
    *linear(f"{DOUBLE}.attn.to_v", f"{OUR_DOUBLE}.attn.to_v"),
    *linear(f"{DOUBLE}.attn.to_out.0", f"{OUR_DOUBLE}.attn.to_out"),
    *linear(f"{DOUBLE}.attn.add_q_proj", f"{OUR_DOUBLE}.attn.add_q_proj"),
    *linear(f"{DOUBLE}.attn.add_k_proj", f"{OUR_DOUBLE}.attn.add_k_proj"),
    *linear(f"{DOUBLE}.attn.add_v_proj", f"{OUR_DOUBLE}.attn.add_v_proj"),
    *linear(f"{DOUBLE}.attn.to_add_out", f"{OUR_DOUBLE}.attn.to_add_out"),
    Rule(f"{DOUBLE}.attn.norm_q.weight", f"{OUR_DOUBLE}.attn.norm_q.scale"),
    Rule(f"{DOUBLE}.attn.norm_k.weight", f"{OUR_DOUBLE}.attn.norm_k.scale"),
    Rule(f"{DOUBLE}.attn.norm_added_q.weight", f"{OUR_DOUBLE}.attn.norm_added_q.scale"),
    Rule(f"{DOUBLE}.attn.norm_added_k.weight", f"{OUR_DOUBLE}.attn.norm_added_k.scale"),
    *linear(f"{DOUBLE}.ff.net.0.proj", f"{OUR_DOUBLE}.ff.proj_in"),
    *linear(f"{DOUBLE}.ff.net.2", f"{OUR_DOUBLE}.ff.proj_out"),
    *linear(f"{DOUBLE}.ff_context.net.0.proj", f"{OUR_DOUBLE}.ff_context.proj_in"),
    *linear(f"{DOUBLE}.ff_context.net.2", f"{OUR_DOUBLE}.ff_context.proj_out"),
    # single blocks
    *linear(f"{SINGLE}.norm.linear", f"{OUR_SINGLE}.norm.linear"),
    *linear(f"{SINGLE}.attn.to_q", f"{OUR_SINGLE}.attn.to_q"),
    *linear(f"{SINGLE}.attn.to_k", f"{OUR_SINGLE}.attn.to_k"),
    *linear(f"{SINGLE}.attn.to_v", f"{OUR_SINGLE}.attn.to_v"),
    Rule(f"{SINGLE}.attn.norm_q.weight", f"{OUR_SINGLE}.attn.norm_q.scale"),
    Rule(f"{SINGLE}.attn.norm_k.weight", f"{OUR_SINGLE}.attn.norm_k.scale"),
    *linear(f"{SINGLE}.proj_mlp", f"{OUR_SINGLE}.proj_mlp"),
    *linear(f"{SINGLE}.proj_out", f"{OUR_SINGLE}.proj_out"),
    # output layer
    *linear("norm_out.linear", "output.norm_out.linear"),
    *linear("proj_out", "output.proj_out"),
)
