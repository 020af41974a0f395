"""FLUX.1's autoencoder: diffusers' AutoencoderKL to models.autoencoder_kl.AutoencoderKL."""

from arcflow_jax.convert.engine import Rule, conv, linear, norm


def resnet(block: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{block}.norm1", f"{block}.norm1"),
        *conv(f"{block}.conv1", f"{block}.conv1"),
        *norm(f"{block}.norm2", f"{block}.norm2"),
        *conv(f"{block}.conv2", f"{block}.conv2"),
        *conv(f"{block}.conv_shortcut", f"{block}.conv_shortcut"),
    )


def ends_and_middle(half: str) -> tuple[Rule, ...]:
    """What encoder and decoder have alike."""
    attention = f"{half}.mid_block.attentions.{{i}}"
    return (
        *conv(f"{half}.conv_in", f"{half}.conv_in"),
        *resnet(f"{half}.mid_block.resnets.{{i}}"),
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
    *resnet("encoder.down_blocks.{i}.resnets.{j}"),
    *conv("encoder.down_blocks.{i}.downsamplers.0.conv", "encoder.down_blocks.{i}.downsampler"),
    *ends_and_middle("decoder"),
    *resnet("decoder.up_blocks.{i}.resnets.{j}"),
    *conv("decoder.up_blocks.{i}.upsamplers.0.conv", "decoder.up_blocks.{i}.upsampler"),
)

# checkpoints from before diffusers 0.12 name the attention's layers otherwise
ALIASES: dict[str, str] = {
    f"{half}.mid_block.attentions.0.{old}": f"{half}.mid_block.attentions.0.{new}"
    for half in ("encoder", "decoder")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
}
