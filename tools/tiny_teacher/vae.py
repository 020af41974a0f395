"""The tiny AutoencoderKL: pixels to 8×8 latents, and back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax.networks.vaes.kl import AutoencoderKL
from arcflow_jax.networks.vaes.vae import VAE
from tools.tiny_teacher.common import load_state, psnr, save_state, train
from tools.tiny_teacher.teacher import Teacher, VAERound


def new_vae(teacher: Teacher) -> AutoencoderKL:
    return AutoencoderKL(teacher.vae, rngs=nnx.Rngs(0))


def make_vae(work: Path, teacher: Teacher, new: Callable[[Teacher], VAE] = new_vae) -> None:
    """Trains a VAE on mean squared and absolute error, a KL and a straightness term. Resumes.

    The KL term keeps invisible detail out of the latents. At λ = 1e-3 it costs at most λ/2 of squared error and gives
    the denoiser smoother latents. The KL term alone may fold the line from black to white into an arc whose ends lie
    close together. Trajectories then split between the two ends, and a two-step student cannot choose one. The
    straightness term prevents this: the latents of the mean of two images must be the mean of their latents.
    """
    graphdef, state = nnx.split(new(teacher))
    draw = teacher.draw(work)

    def loss(state: nnx.State, key: jax.Array, settings: VAERound) -> tuple[jax.Array, dict[str, jax.Array]]:
        image_key, noise_key = jax.random.split(key)
        images, _ = draw(image_key, settings.batch)
        model = nnx.merge(graphdef, state)
        if settings.decoder_only:
            error = model.decode(jax.lax.stop_gradient(model.encode(images))) - images
            mse = jnp.mean(error**2)
            return mse + settings.absolute * jnp.abs(error).mean(), {"mse": mse}
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

    for number, settings in enumerate(teacher.vae_rounds, 1):
        result = work / f"vae-{number}.safetensors"
        if result.exists():
            state = nnx.state(load_state(result, new(teacher)))
            continue
        state = train(
            functools.partial(loss, settings=settings),
            state,
            steps=settings.steps,
            horizon=settings.horizon,
            peak=settings.peak,
            ema=settings.ema,
            every=teacher.every,
            report=report,
            seed=number,
            result=result,
        )
    save_state(work / "vae.safetensors", state)
