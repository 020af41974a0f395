"""Trains a style LoRA on the bundled FLUX.1 teacher, on a CPU in minutes, and writes it as diffusers does.

    python tools/train_style_lora.py --out runs/stripes.safetensors
    arcflow sample --lora runs/stripes.safetensors --prompt "a red circle on the left"

The style is horizontal stripes, or a tint. The LoRA is trained as any other: on captioned images in that style, with
the flow matching loss of the teacher.
"""

# B batch, P pixels along a side, r LoRA rank

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from arcflow_jax.convert.engine import fills
from arcflow_jax.demo import ASSETS, shapes
from arcflow_jax.families.latents import pack
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.layers import linear_layers
from arcflow_jax.networks.states import flatten, unflatten
from arcflow_jax.networks.style import styled
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.storage.paths import as_path
from arcflow_jax.storage.safetensors import write_tensors
from tools.tiny_teacher.denoiser import noisy
from tools.tiny_teacher.shapes import SHAPES

BAND = 8  # pixels
TINT = (1.0, 0.8, 0.5)
LAYERS = ("attn.", "ff.", "ff_context.", "proj_")  # in the blocks


def stripes(images: jax.Array) -> jax.Array:  # [B, P, P, 3] in [-1, 1]
    """Every second band of eight rows at half its brightness."""
    dark = (jnp.arange(images.shape[1]) // BAND) % 2 == 1
    return jnp.where(dark[None, :, None, None], (images + 1) / 2 - 1, images)


def tint(images: jax.Array) -> jax.Array:
    """Less green and blue."""
    return (images + 1) * jnp.array(TINT) - 1


STYLES = {"stripes": stripes, "tint": tint}


def batches(pipe: ArcFlowPipeline, name: str, images: int, batch: int) -> Iterator[tuple[jax.Array, Any]]:
    """Latent tokens [B, N, 4C] of images in a style, and their conditioning: the same few images again and again."""
    abstract: Any = pipe.directory.abstract("vae", jnp.float32)
    graphdef, empty = nnx.split(abstract)
    draw = SHAPES.draw(Path())
    state = pipe.directory.load("vae", empty)

    @jax.jit
    def encode(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn, attributes = draw(key, batch)
        return pack(nnx.merge(graphdef, state).encode(STYLES[name](drawn))), attributes

    rows, columns = pipe.grid()
    stored = []
    for i in range(images // batch):
        tokens, attributes = encode(jax.random.fold_in(jax.random.key(1), i))
        prompts = [str(shapes.Caption(*map(int, row))) for row in np.asarray(attributes)]
        stored.append((tokens, pipe.encode(prompts, guidance=1.0, rows=rows, columns=columns)))
    while True:
        yield from stored


def train(pipe: ArcFlowPipeline, name: str, rank: int, steps: int, batch: int, images: int, rate: float) -> nnx.State:
    """The trained arrays of a LoRA on the transformer's attention and MLPs."""
    network: Any = pipe.directory.abstract("transformer", jnp.float32)
    layers = [path for path in linear_layers(network) if "blocks." in path and any(part in path for part in LAYERS)]
    applied = styled(pipe.graphdef, pipe.transformer.state, layers, rank)
    rng = np.random.default_rng(0)
    start = {  # as peft begins: A random, B zero
        path: np.float32(rng.standard_normal(x.shape) / x.shape[-2] ** 0.5 * path.endswith(".a"))
        for path, x in flatten(applied.state).items()
    }
    lora = jax.tree.map(jnp.asarray, unflatten(applied.state, start))
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(lora: nnx.State, base: nnx.State, key: jax.Array, tokens: jax.Array, conditioning: Any) -> jax.Array:
        model = nnx.merge(applied.graphdef, nnx.merge_state(base, lora))
        x, sigma, velocity = noisy(key, tokens, 0.5)
        return jnp.mean((model.teacher_velocity(x, sigma, conditioning) - velocity) ** 2)

    @jax.jit
    def step(
        lora: nnx.State, moments: Any, base: nnx.State, key: jax.Array, tokens: jax.Array, conditioning: Any
    ) -> Any:
        value, gradients = jax.value_and_grad(loss)(lora, base, key, tokens, conditioning)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(lora, updates), moments, value

    moments, losses = optimizer.init(lora), []
    for i, (tokens, conditioning) in zip(range(steps), batches(pipe, name, images, batch), strict=False):
        key = jax.random.fold_in(jax.random.key(0), i)
        lora, moments, value = step(lora, moments, pipe.transformer.state, key, tokens, conditioning)
        losses.append(value)
        if (i + 1) % 50 == 0:
            print(f"training step {i + 1} of {steps}: loss {np.mean(losses[-50:]):.4f}", flush=True)
    return lora


def export(directory: ModelDirectory, lora: nnx.State) -> dict[str, np.ndarray]:
    """The arrays of a LoRA under the names of diffusers."""
    arrays = {path: np.asarray(x.get_value()) for path, x in flatten(lora).items()}
    layers = {path.removesuffix(".style.a") for path in arrays if path.endswith(".a")}
    kernels = {
        f"{layer}.kernel": (*arrays[f"{layer}.style.a"].shape[:-1], arrays[f"{layer}.style.b"].shape[-1])
        for layer in layers
    }
    tensors = {}
    for fill in fills(directory.networks["transformer"].table, kernels):
        layer = fill.target.removesuffix(".kernel")
        for i, name in enumerate(fill.names):
            for part, letter in (("a", "A"), ("b", "B")):
                array = arrays[f"{layer}.style.{part}"]
                theirs = f"transformer.{name.removesuffix('.weight')}.lora_{letter}.weight"
                tensors[theirs] = np.ascontiguousarray((array[i] if fill.stacked else array).T)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=as_path, required=True, help="the safetensors file to write")
    parser.add_argument("--style", choices=STYLES, default="stripes")
    parser.add_argument("--model", default=ASSETS / "tiny-flux", help="the teacher")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=512, help="how many images it is trained on")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate at the start")
    args = parser.parse_args()
    pipe = ArcFlowPipeline.from_pretrained(args.model, dtype=jnp.float32)
    lora = train(pipe, args.style, args.rank, args.steps, args.batch, args.images, args.rate)
    write_tensors(args.out, export(pipe.directory, lora))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
