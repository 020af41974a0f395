"""AutoencoderKLFlux2, the VAE of FLUX.2 (diffusers' class of that name), NHWC.

    pixels [B, H, W, 3] in [-1, 1]  --encode-->  latents [B, H/f, W/f, C]  --decode-->  pixels

Encoder and decoder are those of AutoencoderKL, with a 1×1 convolution after the one and before the other. Latents are
normalised after `encode` and before `decode`, as the transformer sees them: a batch norm's running mean and variance
are kept for each feature of a token, a 2×2 patch of latent pixels, so the four pixels of a patch have their own. What
decoding needs is in the decoder, which is loaded without the encoder. Attribute names are those of the checkpoint.
"""

# B batch, H, W image size, C latent channels, f = 2^(levels − 1) the downsampling factor

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax.networks.layers import Base, Conv
from arcflow_jax.networks.vaes import kl
from arcflow_jax.networks.vaes.vae import VAE
from arcflow_jax.schema import Epsilon, Widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderKLFlux2Config(kl.LevelsConfig):
    """The model config of this VAE, with the names of its config.json."""

    REQUIRED: ClassVar[dict[str, Any]] = {"act_fn": "silu", "patch_size": [2, 2]}

    decoder_block_out_channels: Widths | None = None  # of a decoder with other widths than the encoder
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    batch_norm_eps: Epsilon = 1e-4


class BatchNorm(nnx.Module):
    """The running statistics of a batch norm over the 4C features c·4 + dy·2 + dx of a token."""

    def __init__(self, channels: int, eps: float, *, dtype: Any):
        self.running_mean = Base(jnp.zeros((4 * channels,), dtype), axes=("norm",))
        self.running_var = Base(jnp.ones((4 * channels,), dtype), axes=("norm",))
        self.eps = eps

    def normalise(self, latents: jax.Array) -> jax.Array:  # [B, h, w, C]
        mean, deviation = self.statistics(latents)
        return ((latents - mean) / deviation).astype(latents.dtype)

    def undo(self, latents: jax.Array) -> jax.Array:  # [B, h, w, C]
        """The inverse of `normalise`."""
        mean, deviation = self.statistics(latents)
        return (latents * deviation + mean).astype(latents.dtype)

    def statistics(self, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of each latent pixel and channel, [h, w, C] each, float32."""
        _, height, width, channels = latents.shape

        def of_pixels(statistic: nnx.Variable) -> jax.Array:
            patch = statistic[...].astype(jnp.float32).reshape(channels, 2, 2).transpose(1, 2, 0)
            return jnp.tile(patch, (height // 2, width // 2, 1))

        return of_pixels(self.running_mean), jnp.sqrt(of_pixels(self.running_var) + self.eps)


class Encoder(kl.Encoder):
    def __init__(self, config: AutoencoderKLFlux2Config, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        channels = 2 * config.latent_channels
        self.quant_conv = Conv(channels, channels, 1, dtype=dtype, rngs=rngs) if config.use_quant_conv else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        return y if self.quant_conv is None else self.quant_conv(y)


class Decoder(kl.Decoder):
    """Of normalised latents."""

    def __init__(self, config: AutoencoderKLFlux2Config, *, dtype: Any, rngs: nnx.Rngs):
        widths = config.decoder_block_out_channels or config.block_out_channels
        super().__init__(dataclasses.replace(config, block_out_channels=widths), dtype=dtype, rngs=rngs)
        channels = config.latent_channels
        self.bn = BatchNorm(channels, config.batch_norm_eps, dtype=dtype)
        convolves = config.use_post_quant_conv
        self.post_quant_conv = Conv(channels, channels, 1, dtype=dtype, rngs=rngs) if convolves else None

    def __call__(self, z: jax.Array) -> jax.Array:
        return super().__call__(self.prepared(z))

    def in_strips(self, z: jax.Array) -> jax.Array:
        return super().in_strips(self.prepared(z))

    def prepared(self, z: jax.Array) -> jax.Array:
        z = self.bn.undo(z)
        return z if self.post_quant_conv is None else self.post_quant_conv(z)


class Statistics(nnx.Module):
    """What encoding needs of the decoder."""

    def __init__(self, bn: BatchNorm):
        self.bn = bn


class AutoencoderKLFlux2(VAE):
    """See the module docstring. `encode` and `decode` compute in the dtype of their input."""

    ENCODER: ClassVar[tuple[str, ...]] = ("encoder", "decoder.bn")

    def __init__(self, config: AutoencoderKLFlux2Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        super().__init__(config, Encoder(config, **options), Decoder(config, **options))

    def encoder_alone(self) -> Self:
        self.decoder = Statistics(self.decoder.bn)
        return self

    def normalise(self, mean: jax.Array) -> jax.Array:
        """Latents as the transformer sees them; of an even height and width."""
        return self.decoder.bn.normalise(mean)

    def decode(self, latents: jax.Array, tiled: bool = False) -> jax.Array:
        """Pixels [B, H, W, 3] of normalised latents, in [-1, 1] up to the error of the network."""
        return self.decoder.in_strips(latents) if tiled else self.decoder(latents)
