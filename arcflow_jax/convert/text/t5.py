"""The tensors of a T5 encoder: transformers' T5EncoderModel ↔ `networks.text.t5`."""

from arcflow_jax.convert.rules import LINEAR, Rule

RULES = (
    Rule("shared.weight", "shared.embedding"),
    Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_attention_bias"),
    Rule("encoder.block.{layer}.layer.0.layer_norm.weight", "blocks.attention_norm.scale"),
    Rule("encoder.block.{layer}.layer.0.SelfAttention.q.weight", "blocks.attention.q.kernel", LINEAR),
    Rule("encoder.block.{layer}.layer.0.SelfAttention.k.weight", "blocks.attention.k.kernel", LINEAR),
    Rule("encoder.block.{layer}.layer.0.SelfAttention.v.weight", "blocks.attention.v.kernel", LINEAR),
    Rule("encoder.block.{layer}.layer.0.SelfAttention.o.weight", "blocks.attention.o.kernel", LINEAR),
    Rule("encoder.block.{layer}.layer.1.layer_norm.weight", "blocks.ff_norm.scale"),
    Rule("encoder.block.{layer}.layer.1.DenseReluDense.wi_0.weight", "blocks.ff.wi_0.kernel", LINEAR),
    Rule("encoder.block.{layer}.layer.1.DenseReluDense.wi_1.weight", "blocks.ff.wi_1.kernel", LINEAR),
    Rule("encoder.block.{layer}.layer.1.DenseReluDense.wo.weight", "blocks.ff.wo.kernel", LINEAR),
    Rule("encoder.final_layer_norm.weight", "final_layer_norm.scale"),
)

# The token embedding has two names in PyTorch; a file has one of them, or both with the same contents
ALIASES = {"encoder.embed_tokens": "shared"}
