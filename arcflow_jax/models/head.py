"""What stands on a trunk: the teacher's output layer, and the student's head that predicts a momentum mixture."""

# B batch, N tokens, D width, K modes, C latent channels; 4 latent pixels a token

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax import momentum
from arcflow_jax.layers import Adapter, Base, LayerNorm, Linear


class OutputNorm(nnx.Module):
    """Layer norm scaled and shifted by the time embedding (diffusers' AdaLayerNormContinuous: scale comes first)."""

    def __init__(self, width: int, *, kind: type[nnx.Variable], dtype: Any, rngs: nnx.Rngs):
        self.linear = Linear(width, 2 * width, axes=("embed", None), kind=kind, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: jax.Array, temb: jax.Array) -> jax.Array:
        scale, shift = jnp.split(self.linear(jax.nn.silu(temb))[:, None], 2, axis=-1)  # [B, 1, D]
        return LayerNorm(hidden.shape[-1], eps=1e-6, affine=False)(hidden) * (1 + scale) + shift


class OutputLayer(nnx.Module):
    """The teacher's: hidden [B, N, D] and time embedding [B, D] to a velocity [B, N, 4C], in float32."""

    def __init__(self, width: int, out_channels: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.norm_out = OutputNorm(width, kind=Base, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(width, out_channels, axes=("embed", None), dtype=dtype, rngs=rngs)

    def __call__(self, hidden: jax.Array, temb: jax.Array) -> jax.Array:
        return self.proj_out(self.norm_out(hidden, temb)).astype(jnp.float32)


class MomentumHead(nnx.Module):
    """The student's: an output norm of its own and three projections to a `momentum.Mixture`, in float32.

    Output rows are mode-major, feature k·4C + c·4 + pixel for the means and k·4 + pixel for logits and momenta, as
    in the authors' export. With one mode there is no momentum, and the head is that of a *linear* student.
    """

    def __init__(self, width: int, out_channels: int, modes: int, *, rngs: nnx.Rngs):
        def linear(rows: int) -> Linear:
            return Linear(width, rows, axes=("embed", None), kind=Adapter, rngs=rngs)

        sizes = momentum.head_sizes(modes, out_channels // 4)
        self.norm_out = OutputNorm(width, kind=Adapter, dtype=jnp.float32, rngs=rngs)
        self.proj_out_means = linear(sizes.means)
        self.proj_out_logweights = linear(sizes.logits)
        self.proj_out_loggamma = linear(sizes.log_momenta) if modes > 1 else None
        self.modes = modes

    def __call__(self, hidden: jax.Array, temb: jax.Array) -> momentum.Mixture:
        y = self.norm_out(hidden, temb)
        b, n, _ = y.shape
        momenta = jnp.zeros((b, n, 0)) if self.proj_out_loggamma is None else self.proj_out_loggamma(y)
        return momentum.Mixture(
            means=self.proj_out_means(y).reshape(b, n, self.modes, -1, 4).astype(jnp.float32),
            logits=self.proj_out_logweights(y).reshape(b, n, self.modes, 4).astype(jnp.float32),
            log_momenta=momenta.reshape(b, n, self.modes - 1, 4).astype(jnp.float32),
        )

    def start_from(self, output: OutputLayer, bias_noise: jax.Array) -> None:
        """Sets the weights so that the student's first velocity is the teacher's, but for the noise.

        Every mode's mean is the teacher's output layer with its bias moved by 0.05 · `bias_noise` [K, C], standard
        normal, which tells the modes apart; the modes are equally likely; momenta start log-spaced.
        """
        self.norm_out.linear.kernel[...] = output.norm_out.linear.kernel[...].astype(jnp.float32)
        self.norm_out.linear.bias[...] = output.norm_out.linear.bias[...].astype(jnp.float32)
        kernel = output.proj_out.kernel[...].astype(jnp.float32)
        bias = output.proj_out.bias[...].astype(jnp.float32)
        self.proj_out_means.kernel[...] = jnp.tile(kernel, (1, self.modes))
        self.proj_out_means.bias[...] = jnp.tile(bias, self.modes) + 0.05 * jnp.repeat(bias_noise.ravel(), 4)
        self.proj_out_logweights.kernel[...] = jnp.zeros_like(self.proj_out_logweights.kernel[...])
        self.proj_out_logweights.bias[...] = jnp.zeros_like(self.proj_out_logweights.bias[...])
        if self.proj_out_loggamma is not None:
            start = momentum.initial_log_momenta(self.modes)  # [K − 1]
            self.proj_out_loggamma.kernel[...] = jnp.zeros_like(self.proj_out_loggamma.kernel[...])
            self.proj_out_loggamma.bias[...] = jnp.repeat(start, 4)
