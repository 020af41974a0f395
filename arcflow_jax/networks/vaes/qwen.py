"""AutoencoderKLQwenImage, the VAE of Qwen-Image (diffusers' class of that name), NHWC, for a single frame.

    pixels [B, H, W, 3] in [-1, 1]  --encode-->  latents [B, H/f, W/f, C]  --decode-->  pixels

It is a video VAE. Its convolutions are causal in time and padded with zeros, so on a single frame only the last time
slice of a kernel has an effect. With that slice alone the network is two-dimensional, and still exact. Layers that join
or split frames do not run. Latents are normalised after `encode` and before `decode`: (z − mean) / std per channel, as
the transformer sees them. Attribute names are those of the checkpoint.
"""

# B batch, H, W image size, C latent channels, f = 2^(levels − 1) the downsampling factor

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arcflow_jax.errors import UserError
from arcflow_jax.networks.attention import attention
from arcflow_jax.networks.layers import Conv, Linear, RMSNorm
from arcflow_jax.networks.vaes.vae import VAE, in_strips, upsampled
from arcflow_jax.schema import Depth, Offset, Pixels, Scale, Width, Widths

# The checkpoint's norms use PyTorch's F.normalize, whose epsilon only guards against a vector of zeros
Norm = functools.partial(RMSNorm, eps=1e-24)


@dataclasses.dataclass(frozen=True)
class AutoencoderKLQwenImageConfig:
    """The model config of this VAE, with the names of its config.json, where Qwen-Image has no `sample_size`."""

    REQUIRED: ClassVar[dict[str, Any]] = {"attn_scales": [], "input_channels": 3}

    base_dim: Width
    z_dim: Width
    dim_mult: Widths
    num_res_blocks: Depth
    latents_mean: tuple[Offset, ...]
    latents_std: tuple[Scale, ...]
    sample_size: Pixels = 1024

    def __post_init__(self):
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise UserError(
                f"latents_mean has {len(self.latents_mean)} numbers and latents_std {len(self.latents_std)}, "
                f"but both have to have z_dim, {self.z_dim}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each level, from the image to the latents."""
        return tuple(self.base_dim * multiple for multiple in self.dim_mult)

    @property
    def factor(self) -> int:
        """f, the number of pixels per latent pixel along one side."""
        return 2 ** (len(self.dim_mult) - 1)


class ResidualBlock(nnx.Module):
    def __init__(self, c_in: int, c_out: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = Norm(c_in, dtype=dtype)
        self.conv1 = Conv(c_in, c_out, 3, dtype=dtype, rngs=rngs)
        self.norm2 = Norm(c_out, dtype=dtype)
        self.conv2 = Conv(c_out, c_out, 3, dtype=dtype, rngs=rngs)
        self.conv_shortcut = Conv(c_in, c_out, 1, dtype=dtype, rngs=rngs) if c_in != c_out else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(nnx.Module):
    """Single-head self-attention over the pixels."""

    def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
        def linear() -> Linear:
            return Linear(channels, channels, axes=("conv_in", "conv_out"), dtype=dtype, rngs=rngs)

        self.norm = Norm(channels, dtype=dtype)
        self.to_q, self.to_k, self.to_v, self.proj = linear(), linear(), linear(), linear()

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = self.norm(x).reshape(b, h * w, 1, c)
        y = attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.proj(y).reshape(b, h, w, c)


class MidBlock(nnx.Module):
    def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResidualBlock(channels, channels, dtype=dtype, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(channels, dtype=dtype, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = self.resnets
        return second(self.attentions[0](first(x)))


class Downsample(nnx.Module):
    def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
        # Only the right and the lower edge, as in diffusers
        padding = ((0, 1), (0, 1))
        self.conv = Conv(channels, channels, 3, stride=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class UpBlock(nnx.Module):
    """A level of the decoder. All but the last one end in an upsampling that halves the channels."""

    def __init__(self, c_in: int, c_out: int, blocks: int, last: bool, *, dtype: Any, rngs: nnx.Rngs):
        self.resnets = nnx.List(
            [ResidualBlock(c_out if i else c_in, c_out, dtype=dtype, rngs=rngs) for i in range(blocks)]
        )
        self.upsampler = None if last else Conv(c_out, c_out // 2, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsampler is None else self.upsampler(upsampled(x))


class Encoder(nnx.Module):
    def __init__(self, config: AutoencoderKLQwenImageConfig, *, dtype: Any, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        width = config.base_dim
        self.conv_in = Conv(3, width, 3, **options)
        blocks: list[nnx.Module] = []  # one flat list, as numbered in the checkpoint
        for level, c_out in enumerate(config.widths):
            for _ in range(config.num_res_blocks):
                blocks.append(ResidualBlock(width, c_out, **options))
                width = c_out
            if level + 1 < len(config.widths):
                blocks.append(Downsample(width, **options))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(width, **options)
        self.norm_out = Norm(width, dtype=dtype)
        self.conv_out = Conv(width, 2 * config.z_dim, 3, **options)
        self.quant_conv = Conv(2 * config.z_dim, 2 * config.z_dim, 1, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.quant_conv(self.conv_out(jax.nn.silu(self.norm_out(self.mid_block(x)))))


class Decoder(nnx.Module):
    def __init__(self, config: AutoencoderKLQwenImageConfig, *, dtype: Any, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        widths = config.widths[::-1]
        self.post_quant_conv = Conv(config.z_dim, config.z_dim, 1, **options)
        self.conv_in = Conv(config.z_dim, widths[0], 3, **options)
        self.mid_block = MidBlock(widths[0], **options)
        self.up_blocks = nnx.List(
            [
                UpBlock(c_in, c_out, config.num_res_blocks + 1, last=i == len(widths) - 1, **options)
                for i, (c_in, c_out) in enumerate(
                    zip((widths[0], *(width // 2 for width in widths)), widths, strict=False)
                )
            ]
        )
        self.norm_out = Norm(widths[-1], dtype=dtype)
        self.conv_out = Conv(widths[-1], 3, 3, **options)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(self.post_quant_conv(z)))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))

    def in_strips(self, z: jax.Array) -> jax.Array:
        """self(z), each level in strips: its norms are of single pixels, so all of it passes at once."""
        x = self.mid_block(self.conv_in(self.post_quant_conv(z)))
        upsampler = None  # of the level before: its result, which is large, is never whole
        for block in self.up_blocks:

            def level(x: jax.Array, up: Conv | None = upsampler, block: UpBlock = block) -> jax.Array:
                x = x if up is None else up(upsampled(x))
                for resnet in block.resnets:
                    x = resnet(x)
                return x if block.upsampler is not None else self.conv_out(jax.nn.silu(self.norm_out(x)))

            scale = 1 if upsampler is None else 2
            convolutions = 2 * len(block.resnets) + 2
            x, upsampler = in_strips(level, x, -(-convolutions // scale), scale), block.upsampler
        return x


class AutoencoderKLQwenImage(VAE):
    """See the module docstring. `encode` and `decode` compute in the dtype of their input."""

    def __init__(self, config: AutoencoderKLQwenImageConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        super().__init__(config, Encoder(config, **options), Decoder(config, **options))

    def normalise(self, mean: jax.Array) -> jax.Array:
        """Latents as the transformer sees them."""
        shift, scale = self.statistics(mean.dtype)
        return (mean - shift) / scale

    def decode(self, latents: jax.Array, tiled: bool = False) -> jax.Array:
        """Pixels [B, H, W, 3] of normalised latents, clipped to [-1, 1]."""
        shift, scale = self.statistics(latents.dtype)
        decoder = self.decoder.in_strips if tiled else self.decoder
        return jnp.clip(decoder(latents * scale + shift), -1.0, 1.0)

    def statistics(self, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the latents, each [C]."""
        return np.array(self.config.latents_mean, dtype), np.array(self.config.latents_std, dtype)
