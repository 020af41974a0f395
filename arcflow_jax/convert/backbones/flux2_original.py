"""FLUX.2's transformer as its authors publish it, in a single file (flux-2-klein-base-4b.safetensors).

It has other names than diffusers' layout. In the double blocks query, key and value are one fused matrix. In the last
layer shift comes before scale.
"""

from arcflow_jax.convert.backbones.flux2 import MLP_IN, MLP_OUT, SINGLE_IN, SINGLE_OUT
from arcflow_jax.convert.rules import LINEAR, SWAPPED_LINEAR, Rule, kernel

DOUBLE, SINGLE = "double_blocks.{layer}", "single_blocks.{layer}"
OUR_DOUBLE, OUR_SINGLE = "backbone.transformer_blocks", "backbone.single_transformer_blocks"


def stream(theirs: str, ours: str, query_key_value: tuple[str, str, str]) -> tuple[Rule, ...]:
    """The rules of one half of a double block.

    Args:
      theirs: "img" or "txt".
      ours: what follows the names of the other layers here.
      query_key_value: the layers that are fused.
    """
    targets = tuple(f"{OUR_DOUBLE}.attn.{name}.kernel" for name in query_key_value)
    out, norm = ("to_add_out", "norm_added") if ours else ("to_out", "norm")
    return (
        *(Rule(f"{DOUBLE}.{theirs}_attn.qkv.weight", target, LINEAR, targets) for target in targets),
        kernel(f"{DOUBLE}.{theirs}_attn.proj", f"{OUR_DOUBLE}.attn.{out}"),
        Rule(f"{DOUBLE}.{theirs}_attn.norm.query_norm.scale", f"{OUR_DOUBLE}.attn.{norm}_q.scale"),
        Rule(f"{DOUBLE}.{theirs}_attn.norm.key_norm.scale", f"{OUR_DOUBLE}.attn.{norm}_k.scale"),
        kernel(f"{DOUBLE}.{theirs}_mlp.0", f"{OUR_DOUBLE}.ff{ours}.linear_in", MLP_IN),
        kernel(f"{DOUBLE}.{theirs}_mlp.2", f"{OUR_DOUBLE}.ff{ours}.linear_out", MLP_OUT),
    )


RULES: tuple[Rule, ...] = (
    kernel("img_in", "backbone.x_embedder"),
    kernel("txt_in", "backbone.context_embedder"),
    kernel("time_in.in_layer", "backbone.time_guidance_embed.timestep_embedder.linear_1"),
    kernel("time_in.out_layer", "backbone.time_guidance_embed.timestep_embedder.linear_2"),
    kernel("guidance_in.in_layer", "backbone.time_guidance_embed.guidance_embedder.linear_1"),
    kernel("guidance_in.out_layer", "backbone.time_guidance_embed.guidance_embedder.linear_2"),
    kernel("double_stream_modulation_img.lin", "backbone.double_stream_modulation_img.linear"),
    kernel("double_stream_modulation_txt.lin", "backbone.double_stream_modulation_txt.linear"),
    kernel("single_stream_modulation.lin", "backbone.single_stream_modulation.linear"),
    *stream("img", "", ("to_q", "to_k", "to_v")),
    *stream("txt", "_context", ("add_q_proj", "add_k_proj", "add_v_proj")),
    kernel(f"{SINGLE}.linear1", f"{OUR_SINGLE}.attn.to_qkv_mlp_proj", SINGLE_IN),
    kernel(f"{SINGLE}.linear2", f"{OUR_SINGLE}.attn.to_out", SINGLE_OUT),
    Rule(f"{SINGLE}.norm.query_norm.scale", f"{OUR_SINGLE}.attn.norm_q.scale"),
    Rule(f"{SINGLE}.norm.key_norm.scale", f"{OUR_SINGLE}.attn.norm_k.scale"),
    # output layer
    kernel("final_layer.adaLN_modulation.1", "output.norm_out.linear", SWAPPED_LINEAR),
    kernel("final_layer.linear", "output.proj_out"),
)

# Files saved by other programs may have this prefix
ALIASES = {"model.diffusion_model": ""}
