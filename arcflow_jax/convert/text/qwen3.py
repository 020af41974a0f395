"""Qwen3's language model, as far as FLUX.2 reads it: transformers' Qwen3ForCausalLM ↔ `networks.text.qwen3`."""

from arcflow_jax.convert.rules import Rule, kernel
from arcflow_jax.networks.text.qwen3 import READ

LAYER, OURS = "model.layers.{layer}", "layers"

RULES = (
    Rule("model.embed_tokens.weight", "embed_tokens.embedding"),
    Rule(f"{LAYER}.input_layernorm.weight", f"{OURS}.input_layernorm.scale"),
    kernel(f"{LAYER}.self_attn.q_proj", f"{OURS}.self_attn.q_proj"),
    kernel(f"{LAYER}.self_attn.k_proj", f"{OURS}.self_attn.k_proj"),
    kernel(f"{LAYER}.self_attn.v_proj", f"{OURS}.self_attn.v_proj"),
    kernel(f"{LAYER}.self_attn.o_proj", f"{OURS}.self_attn.o_proj"),
    Rule(f"{LAYER}.self_attn.q_norm.weight", f"{OURS}.self_attn.q_norm.scale"),
    Rule(f"{LAYER}.self_attn.k_norm.weight", f"{OURS}.self_attn.k_norm.scale"),
    Rule(f"{LAYER}.post_attention_layernorm.weight", f"{OURS}.post_attention_layernorm.scale"),
    kernel(f"{LAYER}.mlp.gate_proj", f"{OURS}.mlp.gate_proj"),
    kernel(f"{LAYER}.mlp.up_proj", f"{OURS}.mlp.up_proj"),
    kernel(f"{LAYER}.mlp.down_proj", f"{OURS}.mlp.down_proj"),
)

# What comes after the layers that are read, of models with up to 100 layers
IGNORED = (*(f"model.layers.{number}.*" for number in range(READ[-1], 100)), "model.norm.weight", "lm_head.weight")
