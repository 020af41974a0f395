"""The tiny FLUX transformer: flow matching on the VAE's latents, then guidance distilled into its embedding.

FLUX.1-dev takes a guidance scale as an input. This network is made like it, in two stages. First it is trained with
and without captions, with 1 as the input of its guidance embedding. Then it learns to give, in one evaluation, what
classifier-free guidance of the first-stage network gives at any scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors.flax import load_file, save_file

from arcflow_jax import schema
from arcflow_jax.convert.engine import import_tensors
from arcflow_jax.data.tokenizers import load_tokenizer, token_length, tokenize
from arcflow_jax.families import latents as packing
from arcflow_jax.families.family import Network
from arcflow_jax.families.flux import CLIP, T5
from arcflow_jax.networks.backbones.flux import Flux, FluxConditioning
from arcflow_jax.networks.student import ArcModel
from arcflow_jax.networks.vaes.vae import VAE
from arcflow_jax.storage.files import read_json
from arcflow_jax.storage.safetensors import read_folder
from tools.tiny_teacher import common
from tools.tiny_teacher.common import Draw
from tools.tiny_teacher.teacher import Round, Teacher
from tools.tiny_teacher.vae import new_vae

GRID = 4  # image tokens along a side


def encode_images(vae: VAE, draw: Draw, count: int) -> tuple[jax.Array, jax.Array]:
    """Packed tokens [·, 16, 4C] of a fixed set of `count` random images, and their attributes [·, A]."""
    graphdef, state = nnx.split(vae)

    @jax.jit
    def encode(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        images, attributes = draw(key, 500)
        return packing.pack(nnx.merge(graphdef, state).encode(images)), attributes

    batches = [encode(jax.random.fold_in(jax.random.key(2), i)) for i in range(count // 500)]
    tokens, attributes = (jnp.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return tokens, attributes


def make_latents(work: Path, teacher: Teacher) -> None:
    """Encodes the images; saves packed tokens, attributes, and the latents' mean and standard deviation."""
    vae = common.load_state(work / "vae.safetensors", new_vae(teacher))
    tokens, attributes = encode_images(vae, teacher.draw(work), teacher.images)
    shift, scale = tokens.mean(), 1 / tokens.std()
    print(f"latents: shift_factor {shift:.4f}, scaling_factor {scale:.4f}")
    save_file(
        {"tokens": (tokens - shift) * scale, "attributes": attributes, "shift": shift, "scale": scale},
        work / "latents.safetensors",
    )


def load_text(folder: Path, prompts: list[str]) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """What embeds prompts: from their indices [B] to T5's states [B, T, D] and CLIP's pooled states [B, P]."""

    def encoder_of(network: Network, encoder: str, tokenizer: str) -> Callable[[jax.Array], Any]:
        config = schema.parse(network.config, read_json(folder / encoder / "config.json"), str(folder / encoder))
        graphdef, abstract = nnx.split(network.abstract(config))
        state = import_tensors(network.table, read_folder(folder / encoder), abstract)
        tokenizer = load_tokenizer(folder / tokenizer)
        ids, _ = tokenize(tokenizer, prompts, token_length(tokenizer))
        return lambda picked: nnx.merge(graphdef, state)(jnp.asarray(ids)[picked])

    t5, clip = encoder_of(T5, "text_encoder_2", "tokenizer_2"), encoder_of(CLIP, "text_encoder", "tokenizer")
    return lambda picked: (t5(picked), clip(picked)[1])


@dataclasses.dataclass(frozen=True)
class Data:
    """Images and the embeddings of captions, which are indices of `Captions.all()`; one more is the empty prompt."""

    tokens: jax.Array  # [·, 16, 4C]
    caption: jax.Array  # [·]
    empty: int
    embed: Callable[[jax.Array], tuple[jax.Array, jax.Array]]

    @classmethod
    def load(cls, work: Path, teacher: Teacher) -> Data:
        latents, every = load_file(work / "latents.safetensors"), teacher.captions.all()
        embed = load_text(work / "text", [*map(str, every), ""])
        return cls(latents["tokens"], teacher.captions.index(latents["attributes"]), len(every), embed)

    def conditioning(self, caption: jax.Array, guidance: jax.Array) -> FluxConditioning:
        text, pooled = self.embed(caption)
        return FluxConditioning(text, pooled, guidance, packing.position_ids(GRID, GRID))

    def draw(self, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, 16, 4C] of random images, and the indices of their captions [B]."""
        picked = jax.random.randint(key, (batch,), 0, len(self.tokens))
        return self.tokens[picked], self.caption[picked]


@dataclasses.dataclass(frozen=True)
class EmbeddedData:
    """The same with captions that were embedded beforehand. A family adds `conditioning`."""

    tokens: jax.Array  # [·, 16, 4C]
    caption: jax.Array  # [·]
    embedded: dict[str, jax.Array]  # [captions + 1, …] each; the last is of the empty prompt

    draw = Data.draw

    @property
    def empty(self) -> int:
        return len(self.embedded["text"]) - 1

    @classmethod
    def load(cls, work: Path, teacher: Teacher) -> Self:
        latents, embedded = load_file(work / "latents.safetensors"), load_file(work / "embeddings.safetensors")
        return cls(latents["tokens"], teacher.captions.index(latents["attributes"]), embedded)


def noisy(key: jax.Array, tokens: jax.Array, centre: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x_σ, σ, velocity) with σ logit-normal around `centre`, stratified over the batch."""
    sigma_key, noise_key = jax.random.split(key)
    batch = len(tokens)
    uniform = (jnp.arange(batch) + jax.random.uniform(sigma_key, (batch,))) / batch
    sigma = jax.nn.sigmoid(centre + 1.4 * jax.scipy.special.ndtri(jnp.clip(uniform, 1e-4, 1 - 1e-4)))
    noise = jax.random.normal(noise_key, tokens.shape)
    weight = sigma[:, None, None]
    return (1 - weight) * tokens + weight * noise, sigma, noise - tokens


def new_model(teacher: Teacher) -> ArcModel:
    rngs = nnx.Rngs(0)
    model = ArcModel(Flux(teacher.transformer, rngs=rngs), param_dtype=jnp.float32, rngs=rngs)
    # Gates and output start at zero, so that training starts from the identity (Peebles & Xie 2023)
    for blocks in (model.backbone.transformer_blocks.norm1, model.backbone.transformer_blocks.norm1_context):
        blocks.linear.kernel[...] = jnp.zeros_like(blocks.linear.kernel[...])
    modulation = model.backbone.single_transformer_blocks.norm.linear
    modulation.kernel[...] = jnp.zeros_like(modulation.kernel[...])
    for linear in (model.output.norm_out.linear, model.output.proj_out):
        linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
    return model


def make_denoiser(
    work: Path,
    teacher: Teacher,
    load: Callable[[Path, Teacher], Any] = Data.load,
    new_model: Callable[[Teacher], ArcModel] = new_model,
    batch: int = 64,
) -> None:
    """Flow matching with 10 % empty captions and guidance scale 1. Resumes."""
    data = load(work, teacher)
    graphdef, state = nnx.split(new_model(teacher))
    for number, settings in enumerate(teacher.rounds, 1):
        result = work / f"denoiser-{number}.safetensors"
        if result.exists():
            state = nnx.state(common.load_state(result, new_model(teacher)))
            continue

        def loss(state: nnx.State, key: jax.Array, settings: Round = settings) -> tuple[jax.Array, dict]:
            draw_key, noise_key, drop_key = jax.random.split(key, 3)
            tokens, caption = data.draw(draw_key, batch)
            caption = jnp.where(jax.random.bernoulli(drop_key, 0.1, caption.shape), data.empty, caption)
            x, sigma, velocity = noisy(noise_key, tokens, settings.centre)
            conditioning = data.conditioning(caption, jnp.ones((batch,)))
            mse = jnp.mean((nnx.merge(graphdef, state).teacher_velocity(x, sigma, conditioning) - velocity) ** 2)
            return mse, {"mse": mse}

        state = common.train(
            loss,
            state,
            steps=settings.steps,
            peak=settings.peak,
            ema=settings.ema,
            every=teacher.every,
            seed=number,
            result=result,
        )
    common.save_state(work / "denoiser.safetensors", state)


def make_guided(work: Path, teacher: Teacher, batch: int = 64) -> None:
    """Trains the guidance embedding: at scale g the output is u∅ + g (u − u∅) of the first-stage network."""
    data = Data.load(work, teacher)
    model = common.load_state(work / "denoiser.safetensors", new_model(teacher))
    graphdef, frozen = nnx.split(model)

    def loss(state: nnx.State, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        draw_key, noise_key, scale_key = jax.random.split(key, 3)
        tokens, caption = data.draw(draw_key, batch)
        x, sigma, _ = noisy(noise_key, tokens, 0.5)
        ones = jnp.ones((batch,))
        both = data.conditioning(
            jnp.concatenate([caption, jnp.full_like(caption, data.empty)]), jnp.concatenate([ones, ones])
        )
        first = nnx.merge(graphdef, frozen)
        with_text, without = jnp.split(
            first.teacher_velocity(jnp.concatenate([x, x]), jnp.concatenate([sigma, sigma]), both), 2
        )
        # Low scales more often: there the target is the first-stage network's own output, in all its detail
        low, high = teacher.guidance
        guidance = low + (high - low) * jax.random.uniform(scale_key, (batch,)) ** 2
        target = without + guidance[:, None, None] * (with_text - without)
        answer = nnx.merge(graphdef, state).teacher_velocity(x, sigma, data.conditioning(caption, guidance))
        mse = jnp.mean((answer - jax.lax.stop_gradient(target)) ** 2)
        return mse, {"mse": mse}

    result = work / "guided.safetensors"
    common.train(loss, frozen, steps=teacher.guided_steps, peak=1e-3, ema=0.995, every=250, result=result)
