"""FLUX.2's VAE: diffusers' AutoencoderKLFlux2 ↔ `networks.vaes.flux2`.

Encoder and decoder have the names of AutoencoderKL's.
"""

from arcflow_jax.convert.rules import Rule, conv
from arcflow_jax.convert.vaes import kl as vae_kl

RULES: tuple[Rule, ...] = (
    *vae_kl.RULES,
    *conv("quant_conv", "encoder.quant_conv"),
    *conv("post_quant_conv", "decoder.post_quant_conv"),
    Rule("bn.running_mean", "decoder.bn.running_mean"),
    Rule("bn.running_var", "decoder.bn.running_var", least=0.0),  # a variance
)

# How many batches the running statistics are of
IGNORED = ("bn.num_batches_tracked",)
