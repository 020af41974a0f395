"""FLUX.1's VAE: diffusers' AutoencoderKL, or the authors' ae.safetensors ↔ `networks.vaes.kl`."""

import dataclasses

from arcflow_jax.convert.rules import POINTWISE, Rule, conv, linear, norm


def resnet(source: str, target: str, shortcut: str = "conv_shortcut") -> tuple[Rule, ...]:
    return (
        *norm(f"{source}.norm1", f"{target}.norm1"),
        *conv(f"{source}.conv1", f"{target}.conv1"),
        *norm(f"{source}.norm2", f"{target}.norm2"),
        *conv(f"{source}.conv2", f"{target}.conv2"),
        *conv(f"{source}.{shortcut}", f"{target}.conv_shortcut"),
    )


def ends_and_middle(half: str) -> tuple[Rule, ...]:
    """The rules that encoder and decoder share."""
    attention = f"{half}.mid_block.attentions.{{i}}"
    return (
        *conv(f"{half}.conv_in", f"{half}.conv_in"),
        *resnet(f"{half}.mid_block.resnets.{{i}}", f"{half}.mid_block.resnets.{{i}}"),
        *norm(f"{attention}.group_norm", f"{attention}.group_norm"),
        *linear(f"{attention}.to_q", f"{attention}.to_q"),
        *linear(f"{attention}.to_k", f"{attention}.to_k"),
        *linear(f"{attention}.to_v", f"{attention}.to_v"),
        *linear(f"{attention}.to_out.0", f"{attention}.to_out"),
        *norm(f"{half}.conv_norm_out", f"{half}.conv_norm_out"),
        *conv(f"{half}.conv_out", f"{half}.conv_out"),
    )


RULES: tuple[Rule, ...] = (
    *ends_and_middle("encoder"),
    *resnet("encoder.down_blocks.{i}.resnets.{j}", "encoder.down_blocks.{i}.resnets.{j}"),
    *conv("encoder.down_blocks.{i}.downsamplers.0.conv", "encoder.down_blocks.{i}.downsampler"),
    *ends_and_middle("decoder"),
    *resnet("decoder.up_blocks.{i}.resnets.{j}", "decoder.up_blocks.{i}.resnets.{j}"),
    *conv("decoder.up_blocks.{i}.upsamplers.0.conv", "decoder.up_blocks.{i}.upsampler"),
)

# Before diffusers 0.12 the layers of the attention had other names
ALIASES: dict[str, str] = {
    f"{half}.mid_block.attentions.0.{old}": f"{half}.mid_block.attentions.0.{new}"
    for half in ("encoder", "decoder")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
}


def original_ends_and_middle(half: str) -> tuple[Rule, ...]:
    """The rules that encoder and decoder share in the authors' layout."""
    attention = f"{half}.mid_block.attentions.0"
    return (
        *conv(f"{half}.conv_in", f"{half}.conv_in"),
        *resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", "nin_shortcut"),
        *norm(f"{half}.mid.attn_1.norm", f"{attention}.group_norm"),
        *pointwise(f"{half}.mid.attn_1.q", f"{attention}.to_q"),
        *pointwise(f"{half}.mid.attn_1.k", f"{attention}.to_k"),
        *pointwise(f"{half}.mid.attn_1.v", f"{attention}.to_v"),
        *pointwise(f"{half}.mid.attn_1.proj_out", f"{attention}.to_out"),
        *resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", "nin_shortcut"),
        *norm(f"{half}.norm_out", f"{half}.conv_norm_out"),
        *conv(f"{half}.conv_out", f"{half}.conv_out"),
    )


def pointwise(source: str, target: str) -> tuple[Rule, Rule]:
    """The rules of a linear layer with bias that is a 1×1 convolution in the source."""
    return Rule(f"{source}.weight", f"{target}.kernel", POINTWISE), Rule(f"{source}.bias", f"{target}.bias")


@dataclasses.dataclass(frozen=True)
class Original:
    """The table of the authors' layout, whose decoder numbers its levels from the image to the latents."""

    levels: int

    @property
    def RULES(self) -> tuple[Rule, ...]:
        decoder = []
        for up, ours in enumerate(reversed(range(self.levels))):
            decoder += resnet(f"decoder.up.{up}.block.{{i}}", f"decoder.up_blocks.{ours}.resnets.{{i}}", "nin_shortcut")
            decoder += conv(f"decoder.up.{up}.upsample.conv", f"decoder.up_blocks.{ours}.upsampler")
        return (
            *original_ends_and_middle("encoder"),
            *resnet("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}", "nin_shortcut"),
            *conv("encoder.down.{i}.downsample.conv", "encoder.down_blocks.{i}.downsampler"),
            *original_ends_and_middle("decoder"),
            *decoder,
        )
