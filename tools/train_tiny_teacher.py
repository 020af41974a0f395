"""Makes the bundled teacher, `arcflow_jax/assets/tiny-flux`, from nothing, stage by stage.

    python tools/train_tiny_teacher.py autoencoder --work /tmp/tiny

Each stage reads what the stages before it left in the work folder and writes its own result there as safetensors.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from safetensors.flax import load_file, save_file

from arcflow_jax.demo import pictures
from arcflow_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

AUTOENCODER = AutoencoderKLConfig(
    block_out_channels=(16, 32, 64, 64),
    layers_per_block=1,
    latent_channels=16,
    norm_num_groups=4,
    scaling_factor=1.0,
    shift_factor=0.0,
)


def save_state(path: Path, state: nnx.State) -> None:
    flat = {".".join(map(str, key)): value[...] for key, value in nnx.to_flat_state(state)}
    save_file(flat, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def load_state(path: Path, state: nnx.State) -> None:
    saved = load_file(path)
    for key, value in nnx.to_flat_state(state):
        value[...] = saved[".".join(map(str, key))]


def psnr(mean_square: jax.Array) -> float:
    """Decibels of a mean squared error of pixels in [-1, 1]."""
    return 10 * math.log10(4 / float(mean_square))


def autoencoder(work: Path, steps: int = 12_000, batch: int = 8, peak: float = 1.5e-3) -> None:
    """Mean squared error plus a light KL term, so that the decoder tolerates the denoiser's errors."""
    graphdef, state = nnx.split(AutoencoderKL(AUTOENCODER, rngs=nnx.Rngs(0)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, 200, steps, peak * 1e-2)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    opt_state = optimizer.init(state)

    @jax.jit
    def step(state, opt_state, key):
        picture_key, noise_key = jax.random.split(key)
        images, _ = pictures.random_pictures(picture_key, batch)

        def loss(state):
            model = nnx.merge(graphdef, state)
            mean, log_variance = model.posterior(images)
            latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(noise_key, mean.shape)
            kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
            mse = jnp.mean((model.decode(latents) - images) ** 2)
            return mse + 3e-5 * kl, (mse, kl)

        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(state)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(state, updates), opt_state, aux

    @jax.jit
    def held_out(state):
        images, _ = pictures.random_pictures(jax.random.key(10**6), 256)
        model = nnx.merge(graphdef, state)
        return jnp.mean((model.decode(model.encode(images)) - images) ** 2)

    start = time.time()
    for i in range(steps):
        state, opt_state, (mse, kl) = step(state, opt_state, jax.random.fold_in(jax.random.key(1), i))
        if (i + 1) % 500 == 0:
            print(
                f"{i + 1:6d} {time.time() - start:6.0f} s  mse {mse:.5f} kl {kl:.3f} "
                f"held out {psnr(held_out(state)):.2f} dB",
                flush=True,
            )
            save_state(work / "autoencoder.safetensors", state)


STAGES = {"autoencoder": autoencoder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    STAGES[args.stage](args.work)


if __name__ == "__main__":
    main()
