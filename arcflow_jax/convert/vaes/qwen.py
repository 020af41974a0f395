"""Qwen-Image's VAE for a single frame: diffusers' AutoencoderKLQwenImage ↔ `networks.vaes.qwen`.

A kernel [out, in, time, height, width] is causal: its last time slice is applied to the frame itself, the others to
earlier frames, which a single image does not have. An export fills those slices with zeros.
"""

import numpy as np

from arcflow_jax.convert.rules import CONV, POINTWISE, Form, Rule, conv


def three_slices(x: np.ndarray) -> np.ndarray:
    """[out, in, height, width] as the last of three time slices."""
    nothing = np.zeros_like(x)
    return np.stack([nothing, nothing, x], axis=2)


def in_time(slices: int) -> Form:
    """The layout of a causal kernel, of which we keep the last time slice."""
    before = three_slices if slices == 3 else lambda x: x[:, :, None]
    return Form(lambda x: CONV.to_ours(x[:, :, -1]), lambda x: before(CONV.to_theirs(x)))


def gamma(dimensions: int) -> Form:
    """The layout of a norm's scale, which they store with trailing dimensions of size 1."""
    return Form(lambda x: x.reshape(-1), lambda x: x.reshape(-1, *[1] * dimensions))


CAUSAL, CAUSAL_POINTWISE = in_time(3), in_time(1)
VIDEO_NORM, IMAGE_NORM = gamma(3), gamma(2)


def causal(source: str, target: str, form: Form = CAUSAL) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{target}.kernel", form), Rule(f"{source}.bias", f"{target}.bias")


def resnet(name: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{name}.norm1.gamma", f"{name}.norm1.scale", VIDEO_NORM),
        *causal(f"{name}.conv1", f"{name}.conv1"),
        Rule(f"{name}.norm2.gamma", f"{name}.norm2.scale", VIDEO_NORM),
        *causal(f"{name}.conv2", f"{name}.conv2"),
        *causal(f"{name}.conv_shortcut", f"{name}.conv_shortcut", CAUSAL_POINTWISE),
    )


def attention(name: str) -> tuple[Rule, ...]:
    layers = [f"{name}.{layer}" for layer in ("to_q", "to_k", "to_v")]
    kernels, biases = (tuple(f"{layer}.{leaf}" for layer in layers) for leaf in ("kernel", "bias"))
    return (
        Rule(f"{name}.norm.gamma", f"{name}.norm.scale", IMAGE_NORM),
        *(Rule(f"{name}.to_qkv.weight", kernel, POINTWISE, kernels) for kernel in kernels),
        *(Rule(f"{name}.to_qkv.bias", bias, fused=biases) for bias in biases),
        Rule(f"{name}.proj.weight", f"{name}.proj.kernel", POINTWISE),
        Rule(f"{name}.proj.bias", f"{name}.proj.bias"),
    )


def ends_and_middle(half: str) -> tuple[Rule, ...]:
    """The rules that encoder and decoder share."""
    return (
        *causal(f"{half}.conv_in", f"{half}.conv_in"),
        *resnet(f"{half}.mid_block.resnets.{{i}}"),
        *attention(f"{half}.mid_block.attentions.{{i}}"),
        Rule(f"{half}.norm_out.gamma", f"{half}.norm_out.scale", VIDEO_NORM),
        *causal(f"{half}.conv_out", f"{half}.conv_out"),
    )


RULES: tuple[Rule, ...] = (
    *ends_and_middle("encoder"),
    *resnet("encoder.down_blocks.{i}"),
    *conv("encoder.down_blocks.{i}.resample.1", "encoder.down_blocks.{i}.conv"),
    *causal("quant_conv", "encoder.quant_conv", CAUSAL_POINTWISE),
    *causal("post_quant_conv", "decoder.post_quant_conv", CAUSAL_POINTWISE),
    *ends_and_middle("decoder"),
    *resnet("decoder.up_blocks.{i}.resnets.{j}"),
    *conv("decoder.up_blocks.{i}.upsamplers.0.resample.1", "decoder.up_blocks.{i}.upsampler"),
)

# Layers that join and split frames
IGNORED = (
    "encoder.down_blocks.{i}.time_conv.weight",
    "encoder.down_blocks.{i}.time_conv.bias",
    "decoder.up_blocks.{i}.upsamplers.0.time_conv.weight",
    "decoder.up_blocks.{i}.upsamplers.0.time_conv.bias",
)
