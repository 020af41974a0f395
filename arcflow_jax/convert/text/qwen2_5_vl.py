"""The text part of Qwen2.5-VL: transformers' Qwen2_5_VLForConditionalGeneration ↔ `networks.text.qwen2_5_vl`."""

from arcflow_jax.convert.rules import LINEAR, Rule, linear

LAYER, OURS = "model.layers.{layer}", "layers"

RULES = (
    Rule("model.embed_tokens.weight", "embed_tokens.embedding"),
    Rule(f"{LAYER}.input_layernorm.weight", f"{OURS}.input_layernorm.scale"),
    *linear(f"{LAYER}.self_attn.q_proj", f"{OURS}.self_attn.q_proj"),
    *linear(f"{LAYER}.self_attn.k_proj", f"{OURS}.self_attn.k_proj"),
    *linear(f"{LAYER}.self_attn.v_proj", f"{OURS}.self_attn.v_proj"),
    Rule(f"{LAYER}.self_attn.o_proj.weight", f"{OURS}.self_attn.o_proj.kernel", LINEAR),
    Rule(f"{LAYER}.post_attention_layernorm.weight", f"{OURS}.post_attention_layernorm.scale"),
    Rule(f"{LAYER}.mlp.gate_proj.weight", f"{OURS}.mlp.gate_proj.kernel", LINEAR),
    Rule(f"{LAYER}.mlp.up_proj.weight", f"{OURS}.mlp.up_proj.kernel", LINEAR),
    Rule(f"{LAYER}.mlp.down_proj.weight", f"{OURS}.mlp.down_proj.kernel", LINEAR),
    Rule("model.norm.weight", "norm.scale"),
)

# The vision tower and the output layer for the next token: text encoding needs neither
IGNORED = ("visual.*", "lm_head.weight")

# Newer versions of transformers use these prefixes
ALIASES = {"model.language_model": "model", "model.visual": "visual"}
