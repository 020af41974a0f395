"""The tiny FLUX transformer: flow matching on the VAE's latents, then guidance distilled into its embedding.

FLUX.1-dev takes a guidance scale as an input. This network is made like it, in two stages. First it is trained with
and without captions, with 1 as the input of its guidance embedding. Then it learns to give, in one evaluation, what
classifier-free guidance of the first-stage network gives at any scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors.flax import load_file, save_file

from arcflow_jax import schema
from arcflow_jax.convert.engine import import_tensors
from arcflow_jax.data.tokenizers import load_tokenizer, token_length, tokenize
from arcflow_jax.demo import world
from arcflow_jax.families import latents as packing
from arcflow_jax.families.family import Network
from arcflow_jax.families.flux import CLIP, T5
from arcflow_jax.networks.flux import Flux, FluxConditioning, FluxConfig
from arcflow_jax.networks.student import ArcModel
from arcflow_jax.networks.vaes.vae import VAE
from arcflow_jax.storage.files import read_json
from arcflow_jax.storage.safetensors import read_folder
from tools.tiny_teacher import common
from tools.tiny_teacher.vae import new_vae

CONFIG = FluxConfig(
    in_channels=16,
    num_layers=2,
    num_single_layers=4,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=64,
    pooled_projection_dim=64,
    guidance_embeds=True,
    axes_dims_rope=(8, 12, 12),
)
GRID = 4  # image tokens along a side
IMAGES = 40_000
GUIDANCE = (1.0, 3.0)  # the range of scales that the second stage learns
CAPTIONS = world.all_captions()


def encode_images(vae: VAE) -> tuple[jax.Array, jax.Array]:
    """Packed tokens [·, 16, 16] of a fixed set of random images, and their attributes [·, 5]."""
    graphdef, state = nnx.split(vae)

    @jax.jit
    def encode(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        images, attributes = world.random_images(key, 500)
        return packing.pack(nnx.merge(graphdef, state).encode(images)), attributes

    batches = [encode(jax.random.fold_in(jax.random.key(2), i)) for i in range(IMAGES // 500)]
    tokens, attributes = (jnp.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return tokens, attributes


def make_latents(work: Path) -> None:
    """Encodes the images; saves packed tokens, attributes, and the latents' mean and standard deviation."""
    vae = common.load_state(work / "vae.safetensors", new_vae())
    tokens, attributes = encode_images(vae)
    shift, scale = tokens.mean(), 1 / tokens.std()
    print(f"latents: shift_factor {shift:.4f}, scaling_factor {scale:.4f}")
    save_file(
        {"tokens": (tokens - shift) * scale, "attributes": attributes, "shift": shift, "scale": scale},
        work / "latents.safetensors",
    )


def make_embeddings(work: Path) -> None:
    """Embeds every caption, then the empty prompt: T5 states [·, T, D] and CLIP's pooled states [·, P]."""
    prompts = [*map(str, CAPTIONS), ""]

    def embed(network: Network, encoder: str, tokenizer: str) -> Any:
        folder = work / "text" / encoder
        config = schema.parse(network.config, read_json(folder / "config.json"), str(folder))
        graphdef, abstract = nnx.split(network.abstract(config))
        state = import_tensors(network.table, read_folder(folder), abstract)
        tokenizer = load_tokenizer(work / "text" / tokenizer)
        ids, _ = tokenize(tokenizer, prompts, token_length(tokenizer))
        return jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, ids)

    text, (_, pooled) = embed(T5, "text_encoder_2", "tokenizer_2"), embed(CLIP, "text_encoder", "tokenizer")
    print(f"text: deviation {text.std():.3f}, pooled: {pooled.std():.3f}")
    save_file({"text": text, "pooled": pooled}, work / "embeddings.safetensors")


def caption_index(attributes: jax.Array) -> jax.Array:
    """Index in `world.all_captions()` of the captions with attributes [B, 5]; a test checks it."""
    index = 0
    for value, (name, values) in zip(attributes.T, world.ATTRIBUTES.items(), strict=True):
        first = -1 if name in world.OMITTED else 0
        index = index * (len(values) - first) + value - first
    return index


@dataclasses.dataclass(frozen=True)
class Data:
    tokens: jax.Array  # [·, 16, 16]
    attributes: jax.Array  # [·, 5]
    text: jax.Array  # [captions + 1, T, D]; the last is the empty prompt
    pooled: jax.Array  # [captions + 1, P]

    @classmethod
    def load(cls, work: Path) -> Data:
        latents, text = load_file(work / "latents.safetensors"), load_file(work / "embeddings.safetensors")
        return cls(latents["tokens"], latents["attributes"], text["text"], text["pooled"])

    def conditioning(self, caption: jax.Array, guidance: jax.Array) -> FluxConditioning:
        positions = packing.position_ids(GRID, GRID)
        return FluxConditioning(self.text[caption], self.pooled[caption], guidance, positions)

    def draw(self, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, 16, 16] of random images, and the indices of their captions [B]."""
        picked = jax.random.randint(key, (batch,), 0, len(self.tokens))
        return self.tokens[picked], caption_index(self.attributes[picked])


def noisy(key: jax.Array, tokens: jax.Array, centre: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x_σ, σ, velocity) with σ logit-normal around `centre`, stratified over the batch."""
    sigma_key, noise_key = jax.random.split(key)
    batch = len(tokens)
    uniform = (jnp.arange(batch) + jax.random.uniform(sigma_key, (batch,))) / batch
    sigma = jax.nn.sigmoid(centre + 1.4 * jax.scipy.special.ndtri(jnp.clip(uniform, 1e-4, 1 - 1e-4)))
    noise = jax.random.normal(noise_key, tokens.shape)
    weight = sigma[:, None, None]
    return (1 - weight) * tokens + weight * noise, sigma, noise - tokens


def new_model() -> ArcModel:
    rngs = nnx.Rngs(0)
    model = ArcModel(Flux(CONFIG, rngs=rngs), param_dtype=jnp.float32, rngs=rngs)
    # Gates and output start at zero, so that training starts from the identity (Peebles & Xie 2023)
    for blocks in (model.backbone.transformer_blocks.norm1, model.backbone.transformer_blocks.norm1_context):
        blocks.linear.kernel[...] = jnp.zeros_like(blocks.linear.kernel[...])
    modulation = model.backbone.single_transformer_blocks.norm.linear
    modulation.kernel[...] = jnp.zeros_like(modulation.kernel[...])
    for linear in (model.output.norm_out.linear, model.output.proj_out):
        linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
    return model


@dataclasses.dataclass(frozen=True)
class Round:
    """A round of training; each starts from the last one's weights, with a warm restart (arXiv 1608.03983)."""

    steps: int
    peak: float  # learning rate
    ema: float
    centre: float = 0.0  # of logit σ


# All rounds draw more of the high noise levels, which decide everything that a caption leaves open
ROUNDS = (
    Round(5_000, 2e-3, 0.998, centre=0.4),
    Round(6_000, 1.5e-3, 0.999, centre=0.6),
)


def make_denoiser(
    work: Path,
    load: Callable[[Path], Any] = Data.load,
    new_model: Callable[[], ArcModel] = new_model,
    batch: int = 64,
) -> None:
    """Flow matching with 10 % empty captions and guidance scale 1. Resumes after the last finished round."""
    data = load(work)
    graphdef, state = nnx.split(new_model())
    empty = len(data.text) - 1
    for number, settings in enumerate(ROUNDS, 1):
        result = work / f"denoiser-{number}.safetensors"
        if result.exists():
            state = nnx.state(common.load_state(result, new_model()))
            continue

        def loss(state: nnx.State, key: jax.Array, settings: Round = settings) -> tuple[jax.Array, dict]:
            draw_key, noise_key, drop_key = jax.random.split(key, 3)
            tokens, caption = data.draw(draw_key, batch)
            caption = jnp.where(jax.random.bernoulli(drop_key, 0.1, caption.shape), empty, caption)
            x, sigma, velocity = noisy(noise_key, tokens, settings.centre)
            conditioning = data.conditioning(caption, jnp.ones((batch,)))
            mse = jnp.mean((nnx.merge(graphdef, state).teacher_velocity(x, sigma, conditioning) - velocity) ** 2)
            return mse, {"mse": mse}

        state = common.train(loss, state, steps=settings.steps, peak=settings.peak, ema=settings.ema, seed=number)
        common.save_state(result, state)
    common.save_state(work / "denoiser.safetensors", state)


def make_guided(work: Path, steps: int = 4_000, batch: int = 64) -> None:
    """Trains the guidance embedding: at scale g the output is u∅ + g (u − u∅) of the first-stage network."""
    data = Data.load(work)
    model = common.load_state(work / "denoiser.safetensors", new_model())
    graphdef, frozen = nnx.split(model)
    empty = len(data.text) - 1

    def loss(state: nnx.State, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        draw_key, noise_key, scale_key = jax.random.split(key, 3)
        tokens, caption = data.draw(draw_key, batch)
        x, sigma, _ = noisy(noise_key, tokens, 0.5)
        ones = jnp.ones((batch,))
        both = data.conditioning(
            jnp.concatenate([caption, jnp.full_like(caption, empty)]), jnp.concatenate([ones, ones])
        )
        first = nnx.merge(graphdef, frozen)
        with_text, without = jnp.split(
            first.teacher_velocity(jnp.concatenate([x, x]), jnp.concatenate([sigma, sigma]), both), 2
        )
        # Low scales more often: there the target is the first-stage network's own output, in all its detail
        low, high = GUIDANCE
        guidance = low + (high - low) * jax.random.uniform(scale_key, (batch,)) ** 2
        target = without + guidance[:, None, None] * (with_text - without)
        answer = nnx.merge(graphdef, state).teacher_velocity(x, sigma, data.conditioning(caption, guidance))
        mse = jnp.mean((answer - jax.lax.stop_gradient(target)) ** 2)
        return mse, {"mse": mse}

    state = common.train(loss, frozen, steps=steps, peak=1e-3, ema=0.995, every=250)
    common.save_state(work / "guided.safetensors", state)
