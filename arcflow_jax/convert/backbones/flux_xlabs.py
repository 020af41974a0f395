"""FLUX.1's attention layers as XLabs' style LoRAs name them, after PyTorch's attention processors.

`lora1` is of the image tokens, `lora2` of the text tokens. The files hold pairs of LoRA and no weights: a rule says
which layer a pair is of. The `qkv_lora` of a single block has no part for the MLP, unlike `linear1` of `flux_original`.
"""

from arcflow_jax.convert.backbones.flux_original import DOUBLE, OUR_DOUBLE, OUR_SINGLE, SINGLE
from arcflow_jax.convert.rules import Rule, fused, linear

RULES: tuple[Rule, ...] = (
    *fused(
        f"{DOUBLE}.processor.qkv_lora1",
        *(f"{OUR_DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v")),
    ),
    *fused(
        f"{DOUBLE}.processor.qkv_lora2",
        *(f"{OUR_DOUBLE}.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")),
    ),
    *linear(f"{DOUBLE}.processor.proj_lora1", f"{OUR_DOUBLE}.attn.to_out"),
    *linear(f"{DOUBLE}.processor.proj_lora2", f"{OUR_DOUBLE}.attn.to_add_out"),
    *fused(f"{SINGLE}.processor.qkv_lora", *(f"{OUR_SINGLE}.attn.{name}" for name in ("to_q", "to_k", "to_v"))),
    *linear(f"{SINGLE}.processor.proj_lora", f"{OUR_SINGLE}.proj_out"),
)
