"""Qwen-Image's transformer: diffusers' QwenImageTransformer2DModel ↔ `networks.backbones.qwen_image` and `output`.

The last block is not in the stack here; it is stored under its number.
"""

from arcflow_jax.convert.rules import Rule, linear


def block(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{source}.img_mod.1", f"{target}.img_mod.linear"),
        *linear(f"{source}.txt_mod.1", f"{target}.txt_mod.linear"),
        *linear(f"{source}.attn.to_q", f"{target}.attn.to_q"),
        *linear(f"{source}.attn.to_k", f"{target}.attn.to_k"),
        *linear(f"{source}.attn.to_v", f"{target}.attn.to_v"),
        *linear(f"{source}.attn.to_out.0", f"{target}.attn.to_out"),
        *linear(f"{source}.attn.add_q_proj", f"{target}.attn.add_q_proj"),
        *linear(f"{source}.attn.add_k_proj", f"{target}.attn.add_k_proj"),
        *linear(f"{source}.attn.add_v_proj", f"{target}.attn.add_v_proj"),
        *linear(f"{source}.attn.to_add_out", f"{target}.attn.to_add_out"),
        Rule(f"{source}.attn.norm_q.weight", f"{target}.attn.norm_q.scale"),
        Rule(f"{source}.attn.norm_k.weight", f"{target}.attn.norm_k.scale"),
        Rule(f"{source}.attn.norm_added_q.weight", f"{target}.attn.norm_added_q.scale"),
        Rule(f"{source}.attn.norm_added_k.weight", f"{target}.attn.norm_added_k.scale"),
        *linear(f"{source}.img_mlp.net.0.proj", f"{target}.img_mlp.proj_in"),
        *linear(f"{source}.img_mlp.net.2", f"{target}.img_mlp.proj_out"),
        *linear(f"{source}.txt_mlp.net.0.proj", f"{target}.txt_mlp.proj_in"),
        *linear(f"{source}.txt_mlp.net.2", f"{target}.txt_mlp.proj_out"),
    )


RULES: tuple[Rule, ...] = (
    *linear("img_in", "backbone.img_in"),
    Rule("txt_norm.weight", "backbone.txt_norm.scale"),
    *linear("txt_in", "backbone.txt_in"),
    *linear("time_text_embed.timestep_embedder.linear_1", "backbone.time_text_embed.timestep_embedder.linear_1"),
    *linear("time_text_embed.timestep_embedder.linear_2", "backbone.time_text_embed.timestep_embedder.linear_2"),
    *block("transformer_blocks.{layer}", "backbone.transformer_blocks"),
    *block("transformer_blocks.{last}", "backbone.last_block.{last}"),
    # output layer
    *linear("norm_out.linear", "output.norm_out.linear"),
    *linear("proj_out", "output.proj_out"),
)
