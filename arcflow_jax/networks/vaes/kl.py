"""AutoencoderKL, the VAE of FLUX.1 (diffusers' class of that name), NHWC.

    pixels [B, H, W, 3] in [-1, 1]  --encode-->  latents [B, H/f, W/f, C]  --decode-->  pixels

Latents are normalised after `encode` and before `decode`: (z − shift_factor) · scaling_factor, as the transformer
sees them. Attribute names are those of the checkpoint.
"""

# B batch, H, W image size, C latent channels, f = 2^(levels − 1) the downsampling factor

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax.errors import UserError
from arcflow_jax.networks.attention import attention
from arcflow_jax.networks.layers import Conv, GroupNorm, Linear
from arcflow_jax.networks.vaes.vae import VAE, in_strips, moments, upsampled
from arcflow_jax.schema import Depth, Offset, Pixels, Scale, Width, Widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelsConfig:
    """What describes encoder and decoder, with the names of a config.json."""

    block_out_channels: Widths
    layers_per_block: Depth
    latent_channels: Width
    norm_num_groups: Width
    in_channels: Width = 3
    out_channels: Width = 3
    mid_block_add_attention: bool = True
    sample_size: Pixels | None = None

    def __post_init__(self) -> None:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise UserError(
                    f"block_out_channels has {channels}, but has to have multiples of norm_num_groups, "
                    f"{self.norm_num_groups}"
                )

    @property
    def factor(self) -> int:
        """f, the number of pixels per latent pixel along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(LevelsConfig):
    """The model config of an AutoencoderKL, with the names of its config.json."""

    REQUIRED: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latents_mean": None,
        "latents_std": None,
    }

    scaling_factor: Scale
    shift_factor: Offset


class ResnetBlock(nnx.Module):
    def __init__(self, c_in: int, c_out: int, groups: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(c_in, groups, dtype=dtype)
        self.conv1 = Conv(c_in, c_out, 3, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(c_out, groups, dtype=dtype)
        self.conv2 = Conv(c_out, c_out, 3, dtype=dtype, rngs=rngs)
        self.conv_shortcut = Conv(c_in, c_out, 1, dtype=dtype, rngs=rngs) if c_in != c_out else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + self.shortcut(x)

    def shortcut(self, x: jax.Array) -> jax.Array:
        return x if self.conv_shortcut is None else self.conv_shortcut(x)

    def in_strips(self, x: jax.Array, before: Callable[[jax.Array], jax.Array], scale: int) -> jax.Array:
        """self(before(x)), computed in strips: twice what precedes a norm for its statistics, which needs no memory.

        Args:
          x: [B, H, W, C].
          before: at most one convolution, to [B, sH, sW, C].
          scale: s; 2 if `before` has a convolution.
        """
        HALO = 2  # two convolutions, or three on twice as many rows
        first = moments(before, x, HALO, scale)

        def middle(x: jax.Array) -> jax.Array:
            return self.conv1(jax.nn.silu(self.norm1(x, first)))

        second = moments(lambda x: middle(before(x)), x, HALO, scale)

        def whole(x: jax.Array) -> jax.Array:
            x = before(x)
            return self.conv2(jax.nn.silu(self.norm2(middle(x), second))) + self.shortcut(x)

        return in_strips(whole, x, HALO, scale)


class AttentionBlock(nnx.Module):
    """Single-head self-attention over the pixels."""

    def __init__(self, channels: int, groups: int, *, dtype: Any, rngs: nnx.Rngs):
        def linear() -> Linear:
            return Linear(channels, channels, axes=("conv_in", "conv_out"), dtype=dtype, rngs=rngs)

        self.group_norm = GroupNorm(channels, groups, dtype=dtype)
        self.to_q, self.to_k, self.to_v, self.to_out = linear(), linear(), linear(), linear()

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, 1, c)
        y = attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out(y).reshape(b, h, w, c)


class MidBlock(nnx.Module):
    def __init__(self, channels: int, groups: int, attention: bool, *, dtype: Any, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, dtype=dtype, rngs=rngs) for _ in range(2)])
        blocks = [AttentionBlock(channels, groups, dtype=dtype, rngs=rngs)] if attention else []
        self.attentions = nnx.List(blocks)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.resnets[0](x)
        for block in self.attentions:
            x = block(x)
        return self.resnets[1](x)


class DownBlock(nnx.Module):
    def __init__(self, c_in: int, c_out: int, config: LevelsConfig, last: bool, *, dtype: Any, rngs: nnx.Rngs):
        groups = config.norm_num_groups
        widths = [c_in] + [c_out] * config.layers_per_block
        self.resnets = nnx.List(
            [ResnetBlock(a, b, groups, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        # diffusers pads only the right and the lower edge before its strided convolution
        self.downsampler = (
            None if last else Conv(c_out, c_out, 3, stride=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsampler is None else self.downsampler(x)


class UpBlock(nnx.Module):
    def __init__(self, c_in: int, c_out: int, config: LevelsConfig, last: bool, *, dtype: Any, rngs: nnx.Rngs):
        groups = config.norm_num_groups
        widths = [c_in] + [c_out] * (config.layers_per_block + 1)
        self.resnets = nnx.List(
            [ResnetBlock(a, b, groups, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        self.upsampler = None if last else Conv(c_out, c_out, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsampler is None else self.upsampler(upsampled(x))


class Encoder(nnx.Module):
    def __init__(self, config: LevelsConfig, *, dtype: Any, rngs: nnx.Rngs):
        widths = config.block_out_channels
        self.conv_in = Conv(config.in_channels, widths[0], 3, dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownBlock(a, b, config, last=i == len(widths) - 1, dtype=dtype, rngs=rngs)
                for i, (a, b) in enumerate(zip((widths[0], *widths), widths, strict=False))
            ]
        )
        groups = config.norm_num_groups
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention, dtype=dtype, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups, dtype=dtype)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    def __init__(self, config: LevelsConfig, *, dtype: Any, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        groups = config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], 3, dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention, dtype=dtype, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                UpBlock(a, b, config, last=i == len(widths) - 1, dtype=dtype, rngs=rngs)
                for i, (a, b) in enumerate(zip((widths[0], *widths), widths, strict=False))
            ]
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups, dtype=dtype)
        self.conv_out = Conv(widths[-1], config.out_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

    def in_strips(self, z: jax.Array) -> jax.Array:
        """self(z), the levels computed in strips."""
        x = self.mid_block(self.conv_in(z))
        upsampler = None  # of the level before: its result, which is large, is never whole
        for block in self.up_blocks:
            for resnet in block.resnets:
                before, scale = (lambda x: x, 1) if upsampler is None else (lambda x, up=upsampler: up(upsampled(x)), 2)
                x, upsampler = resnet.in_strips(x, before, scale), None
            upsampler = block.upsampler
        statistics = moments(lambda x: x, x, 0)
        return in_strips(lambda x: self.conv_out(jax.nn.silu(self.conv_norm_out(x, statistics))), x, 1)


class AutoencoderKL(VAE):
    """See the module docstring. `encode` and `decode` compute in the dtype of their input."""

    def __init__(self, config: AutoencoderKLConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        super().__init__(config, Encoder(config, **options), Decoder(config, **options))

    def normalise(self, mean: jax.Array) -> jax.Array:
        """Latents as the transformer sees them."""
        return (mean - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: jax.Array, tiled: bool = False) -> jax.Array:
        """Pixels [B, H, W, 3] of normalised latents, in [-1, 1] up to the error of the network."""
        decoder = self.decoder.in_strips if tiled else self.decoder
        return decoder(latents / self.config.scaling_factor + self.config.shift_factor)
