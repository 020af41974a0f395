"""The tensors of a CLIP text encoder: transformers' CLIPTextModel ↔ `networks.text.clip`."""

from arcflow_jax.convert.rules import LINEAR, Rule

RULES = (
    Rule("text_model.embeddings.token_embedding.weight", "token_embedding.embedding"),
    Rule("text_model.embeddings.position_embedding.weight", "position_embedding.embedding"),
    Rule("text_model.encoder.layers.{layer}.layer_norm1.weight", "layers.layer_norm1.scale"),
    Rule("text_model.encoder.layers.{layer}.layer_norm1.bias", "layers.layer_norm1.bias"),
    Rule("text_model.encoder.layers.{layer}.self_attn.q_proj.weight", "layers.self_attn.q_proj.kernel", LINEAR),
    Rule("text_model.encoder.layers.{layer}.self_attn.q_proj.bias", "layers.self_attn.q_proj.bias"),
    Rule("text_model.encoder.layers.{layer}.self_attn.k_proj.weight", "layers.self_attn.k_proj.kernel", LINEAR),
    Rule("text_model.encoder.layers.{layer}.self_attn.k_proj.bias", "layers.self_attn.k_proj.bias"),
    Rule("text_model.encoder.layers.{layer}.self_attn.v_proj.weight", "layers.self_attn.v_proj.kernel", LINEAR),
    Rule("text_model.encoder.layers.{layer}.self_attn.v_proj.bias", "layers.self_attn.v_proj.bias"),
    Rule("text_model.encoder.layers.{layer}.self_attn.out_proj.weight", "layers.self_attn.out_proj.kernel", LINEAR),
    Rule("text_model.encoder.layers.{layer}.self_attn.out_proj.bias", "layers.self_attn.out_proj.bias"),
    Rule("text_model.encoder.layers.{layer}.layer_norm2.weight", "layers.layer_norm2.scale"),
    Rule("text_model.encoder.layers.{layer}.layer_norm2.bias", "layers.layer_norm2.bias"),
    Rule("text_model.encoder.layers.{layer}.mlp.fc1.weight", "layers.mlp.fc1.kernel", LINEAR),
    Rule("text_model.encoder.layers.{layer}.mlp.fc1.bias", "layers.mlp.fc1.bias"),
    Rule("text_model.encoder.layers.{layer}.mlp.fc2.weight", "layers.mlp.fc2.kernel", LINEAR),
    Rule("text_model.encoder.layers.{layer}.mlp.fc2.bias", "layers.mlp.fc2.bias"),
    Rule("text_model.final_layer_norm.weight", "final_layer_norm.scale"),
    Rule("text_model.final_layer_norm.bias", "final_layer_norm.bias"),
)

# Older versions of transformers saved the positions 0, 1, 2, … with the weights
IGNORED = ("text_model.embeddings.position_ids",)

# transformers 5 writes the same tensors without the prefix
ALIASES = {name: f"text_model.{name}" for name in ("embeddings", "encoder", "final_layer_norm")}
