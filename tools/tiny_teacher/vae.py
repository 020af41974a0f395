"""The tiny AutoencoderKL: pixels to 8×8 latents of 4 channels, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax.demo import world
from arcflow_jax.networks.vaes.kl import AutoencoderKL, AutoencoderKLConfig
from arcflow_jax.networks.vaes.vae import VAE
from tools.tiny_teacher.common import Draw, psnr, save_state, train

CONFIG = AutoencoderKLConfig(
    block_out_channels=(16, 32, 64, 64),
    layers_per_block=1,
    latent_channels=4,  # enough for these images, and less for the denoiser to learn than FLUX.1's 16
    norm_num_groups=4,
    scaling_factor=1.0,  # set at assembly, from the latents' mean and standard deviation
    shift_factor=0.0,
)


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(CONFIG, rngs=nnx.Rngs(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAETraining:
    steps: int = 4_500
    horizon: int = 6_000  # steps that the learning rate decays over
    every: int = 500  # steps from report to report, and from one saving of the progress to the next
    batch: int = 8
    peak: float = 1.5e-3  # learning rate
    ema: float = 0.0
    # Weights of the terms beside the mean squared error
    absolute: float = 0.0
    kl: float = 1e-3
    bend: float = 1e-2


def make_vae(
    work: Path,
    new: Callable[[], VAE] = new_vae,
    draw: Draw = world.random_images,
    settings: VAETraining = VAETraining(),  # noqa: B008
) -> None:
    """Trains a VAE on mean squared and absolute error, a KL term and a straightness term. Resumes.

    The KL term keeps invisible detail out of the latents. At λ = 1e-3 it costs at most λ/2 of squared error and gives
    the denoiser smoother latents. The KL term alone may fold the line from black to white into an arc whose ends lie
    close together. Trajectories then split between the two ends, and a two-step student cannot choose one. The
    straightness term prevents this: the latents of the mean of two images must be the mean of their latents.
    """
    graphdef, state = nnx.split(new())

    def loss(state: nnx.State, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        image_key, noise_key = jax.random.split(key)
        images, _ = draw(image_key, settings.batch)
        model = nnx.merge(graphdef, state)
        mean, log_variance = model.posterior(images)
        latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(noise_key, mean.shape)
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
        error = model.decode(latents) - images
        mse = jnp.mean(error**2)
        between, _ = model.posterior((images[::2] + images[1::2]) / 2)
        bend = jnp.mean((between - (mean[::2] + mean[1::2]) / 2) ** 2)
        value = mse + settings.absolute * jnp.abs(error).mean() + settings.kl * kl + settings.bend * bend
        return value, {"mse": mse, "kl": kl, "bend": bend}

    @jax.jit
    def held_out(state: nnx.State) -> jax.Array:
        images, _ = draw(jax.random.key(10**6), 256)
        model = nnx.merge(graphdef, state)
        return jnp.mean((model.decode(model.encode(images)) - images) ** 2)

    def report(state: nnx.State) -> dict[str, float]:
        return {"held-out PSNR in dB": psnr(held_out(state))}

    state = train(
        loss,
        state,
        steps=settings.steps,
        horizon=settings.horizon,
        peak=settings.peak,
        ema=settings.ema,
        every=settings.every,
        report=report,
        progress=work / "vae.progress",
    )
    save_state(work / "vae.safetensors", state)
