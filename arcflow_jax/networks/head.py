"""The layers after a backbone: the teacher's output layer, and the student's head, which predicts a curve."""

# B batch, N tokens, D width, K coefficients, C latent channels; 4 latent pixels per token

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arcflow_jax.flow import legendre, momentum
from arcflow_jax.networks.layers import Adapter, Base, LayerNorm, Linear


class OutputNorm(nnx.Module):
    """Layer norm with scale and shift from the time embedding (diffusers' AdaLayerNormContinuous: scale first)."""

    def __init__(self, width: int, *, bias: bool = True, kind: type[nnx.Variable], dtype: Any, rngs: nnx.Rngs):
        self.linear = Linear(width, 2 * width, bias=bias, axes=("embed", None), kind=kind, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: jax.Array, temb: jax.Array) -> jax.Array:
        scale, shift = jnp.split(self.linear(jax.nn.silu(temb))[:, None], 2, axis=-1)  # [B, 1, D]
        return LayerNorm(hidden.shape[-1], eps=1e-6, affine=False)(hidden) * (1 + scale) + shift


class OutputLayer(nnx.Module):
    """The teacher's output layer: hidden [B, N, D] and time embedding [B, D] to a float32 velocity [B, N, 4C]."""

    def __init__(self, width: int, out_channels: int, *, bias: bool = True, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.norm_out = OutputNorm(width, bias=bias, kind=Base, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(width, out_channels, bias=bias, axes=("embed", None), dtype=dtype, rngs=rngs)

    def __call__(self, hidden: jax.Array, temb: jax.Array) -> jax.Array:
        return self.proj_out(self.norm_out(hidden, temb)).astype(jnp.float32)


def bias_of(layer: Linear) -> jax.Array:
    """The bias of a layer, float32; zeros if it has none."""
    return jnp.zeros(layer.kernel.shape[-1]) if layer.bias is None else layer.bias[...].astype(jnp.float32)


class CurveHead(nnx.Module):
    """The student's head: its own output norm and linear projections, to a float32 curve with K coefficients.

    Output rows are mode-major, feature k·4C + c·4 + pixel, as in the authors' export. Its layers have biases also where
    the teacher's have none: the noise that makes the modes differ is in one.
    """

    def __init__(self, width: int, out_channels: int, modes: int, *, rngs: nnx.Rngs):
        self.norm_out = OutputNorm(width, kind=Adapter, dtype=jnp.float32, rngs=rngs)
        self.width, self.channels, self.modes = width, out_channels // 4, modes

    def project(self, rows: int, rngs: nnx.Rngs) -> Linear:
        return Linear(self.width, rows, axes=("embed", None), kind=Adapter, rngs=rngs)

    def initialize_from(self, output: OutputLayer, noise: jax.Array) -> None:
        """Sets the weights so that the student's velocity is the teacher's, perturbed by `noise`.

        Args:
          output: the teacher's output layer.
          noise: standard normal, [K, C]; it makes the modes of a mixture differ.
        """
        self.norm_out.linear.kernel[...] = output.norm_out.linear.kernel[...].astype(jnp.float32)
        self.norm_out.linear.bias[...] = bias_of(output.norm_out.linear)

    def constant(self, change: np.ndarray) -> tuple[str, np.ndarray]:
        """A change [.., 4C] of the output of the teacher's last layer, as the head takes it.

        Returns:
          Which of the head's projections takes it, and the change [.., features] of that one's output, which adds the
          same velocity at the start of every segment.
        """
        raise NotImplementedError


class MomentumHead(CurveHead):
    """Predicts a `momentum.Mixture`: means, and for each pixel logits and log-momenta, feature k·4 + pixel.

    With one mode there is no momentum, and the student is the *linear* one.
    """

    def __init__(self, width: int, out_channels: int, modes: int, momenta: tuple[float, float], *, rngs: nnx.Rngs):
        super().__init__(width, out_channels, modes, rngs=rngs)
        sizes = momentum.head_sizes(modes, self.channels)
        self.proj_out_means = self.project(sizes.means, rngs)
        self.proj_out_logweights = self.project(sizes.logits, rngs)
        self.proj_out_loggamma = self.project(sizes.log_momenta, rngs) if modes > 1 else None
        self.momenta = momenta

    def __call__(self, hidden: jax.Array, temb: jax.Array) -> momentum.Mixture:
        y = self.norm_out(hidden, temb)
        b, n, _ = y.shape
        momenta = jnp.zeros((b, n, 0)) if self.proj_out_loggamma is None else self.proj_out_loggamma(y)
        return momentum.Mixture(
            means=self.proj_out_means(y).reshape(b, n, self.modes, -1, 4).astype(jnp.float32),
            logits=self.proj_out_logweights(y).reshape(b, n, self.modes, 4).astype(jnp.float32),
            log_momenta=momenta.reshape(b, n, self.modes - 1, 4).astype(jnp.float32),
        )

    def initialize_from(self, output: OutputLayer, noise: jax.Array) -> None:
        """See `CurveHead`. The mean of each mode is the teacher's output layer with 0.05 · `noise` added to its bias.

        All modes have the same weight. The momenta are log-spaced.
        """
        super().initialize_from(output, noise)
        kernel = output.proj_out.kernel[...].astype(jnp.float32)
        self.proj_out_means.kernel[...] = jnp.tile(kernel, (1, self.modes))
        self.proj_out_means.bias[...] = jnp.tile(bias_of(output.proj_out), self.modes) + 0.05 * jnp.repeat(
            noise.ravel(), 4
        )
        self.proj_out_logweights.kernel[...] = jnp.zeros_like(self.proj_out_logweights.kernel[...])
        self.proj_out_logweights.bias[...] = jnp.zeros_like(self.proj_out_logweights.bias[...])
        if self.proj_out_loggamma is not None:
            log_momenta = momentum.initial_log_momenta(self.modes, self.momenta)  # [K − 1]
            self.proj_out_loggamma.kernel[...] = jnp.zeros_like(self.proj_out_loggamma.kernel[...])
            self.proj_out_loggamma.bias[...] = jnp.repeat(log_momenta, 4)

    def constant(self, change: np.ndarray) -> tuple[str, np.ndarray]:
        """See `CurveHead`: the same for the mean of each mode."""
        return "proj_out_means", np.tile(change, self.modes)


class LegendreHead(CurveHead):
    """Predicts a `legendre.Series`."""

    def __init__(self, width: int, out_channels: int, modes: int, *, rngs: nnx.Rngs):
        super().__init__(width, out_channels, modes, rngs=rngs)
        self.proj_out_coefficients = self.project(modes * out_channels, rngs)

    def __call__(self, hidden: jax.Array, temb: jax.Array) -> legendre.Series:
        y = self.proj_out_coefficients(self.norm_out(hidden, temb))
        return legendre.Series(y.reshape(*y.shape[:2], self.modes, -1, 4).astype(jnp.float32))

    def initialize_from(self, output: OutputLayer, noise: jax.Array) -> None:
        """See `CurveHead`. c_0 is the teacher's output layer and the other coefficients are 0; `noise` is not used."""
        super().initialize_from(output, noise)
        ours, theirs = self.proj_out_coefficients, output.proj_out
        for weight, first in ((ours.kernel, theirs.kernel[...].astype(jnp.float32)), (ours.bias, bias_of(theirs))):
            weight[...] = jnp.zeros_like(weight[...]).at[..., : first.shape[-1]].set(first)

    def constant(self, change: np.ndarray) -> tuple[str, np.ndarray]:
        """See `CurveHead`: for c_0 alone."""
        wide = np.zeros((*change.shape[:-1], self.modes * change.shape[-1]), change.dtype)
        wide[..., : change.shape[-1]] = change
        return "proj_out_coefficients", wide
