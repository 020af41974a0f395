"""The tiny teacher as a Qwen-Image: the stages in which it differs from the bundled FLUX.1.

It uses classifier-free guidance, which needs no stage of its own: the network is trained with and without captions.
"""

# B batch, N image tokens, T text tokens, D width, C latent channels

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.flax import load_file, save_file

from arcflow_jax import schema
from arcflow_jax.convert.backbones import qwen_image as transformer_table
from arcflow_jax.convert.engine import import_tensors
from arcflow_jax.convert.text import qwen2_5_vl as text_table
from arcflow_jax.convert.vaes import qwen as vae_table
from arcflow_jax.data.tokenizers import load_tokenizer, tokenize
from arcflow_jax.families import latents as packing
from arcflow_jax.families.qwen_image import QWEN2_5_VL, QwenPrompts
from arcflow_jax.networks.backbones.qwen_image import QwenImage, QwenImageConditioning, QwenImageConfig
from arcflow_jax.networks.student import ArcModel
from arcflow_jax.networks.text.qwen2_5_vl import Qwen2_5VLConfig, Qwen2_5VLText
from arcflow_jax.networks.vaes.qwen import AutoencoderKLQwenImage, AutoencoderKLQwenImageConfig
from arcflow_jax.storage.atomic import whole_directory
from arcflow_jax.storage.files import read_json
from arcflow_jax.storage.safetensors import read_folder
from tools.make_tiny_qwen import CONFIGS, LENGTH, PIPELINE, make_tokenizer
from tools.tiny_teacher import common, denoiser, text, vae
from tools.tiny_teacher.assemble import print_size, start_folder, write_component
from tools.tiny_teacher.shapes import SHAPES
from tools.tiny_teacher.teacher import Teacher

WIDTH = 64  # of the text encoder
CONFIG = QwenImageConfig(
    in_channels=16,
    num_layers=5,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=WIDTH,
    axes_dims_rope=(8, 12, 12),
)
CHANNELS = CONFIG.in_channels // 4
VAE = AutoencoderKLQwenImageConfig(
    base_dim=16,
    z_dim=CHANNELS,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=1,
    latents_mean=(0.0,) * CHANNELS,  # set at assembly, from the latents
    latents_std=(1.0,) * CHANNELS,
    sample_size=64,
)


def new_vae(teacher: Teacher) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(VAE, rngs=nnx.Rngs(0))


def make_vae(work: Path) -> None:
    vae.make_vae(work, SHAPES, new_vae)


def token_ids(tokenizer: Any, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the prompts in Qwen-Image's template, [B, LENGTH], and their lengths without padding, [B]."""
    ids, _ = tokenize(tokenizer, [QwenPrompts.TEMPLATE.format(prompt) for prompt in prompts], LENGTH)
    return ids, (ids != tokenizer.pad_token_id).sum(axis=1)


def make_text(work: Path, seed: int = 0) -> None:
    """Writes tokenizer and text_encoder. In a causal encoder only the last token has read the whole caption."""
    shutil.rmtree(work / "text", ignore_errors=True)
    with whole_directory(work / "text", needed=0) as aside:
        vocabulary = make_tokenizer(aside / "tokenizer")
        tokenizer = load_tokenizer(aside / "tokenizer")
        prompts, answers = text.prompts_and_answers(SHAPES.captions)
        ids, _ = token_ids(tokenizer, prompts)

        config = CONFIGS["text_encoder"]
        sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "vocab_size": vocabulary}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = config | {"text_config": config["text_config"] | sizes}
        encoder = Qwen2_5VLText(schema.parse(Qwen2_5VLConfig, config, "text_encoder"), rngs=nnx.Rngs(seed))

        def features(encoder: Qwen2_5VLText, ids: jax.Array) -> jax.Array:  # [B, T] -> [B, D]
            last = (ids != tokenizer.pad_token_id).sum(axis=1) - 1
            return jnp.take_along_axis(encoder(ids), last[:, None, None], axis=1)[:, 0]

        counts = text.answers_of(SHAPES.captions)
        encoder = text.train_encoder(encoder, ids, answers, counts, features, scaled=("norm",), seed=seed, width=WIDTH)
        text.write_encoder(aside / "text_encoder", config, text_table, encoder, "float32")


def make_latents(work: Path) -> None:
    """As for FLUX.1, but with a mean per channel.

    The standard deviation is shared by all channels. The VAE may leave a channel nearly empty, and its own deviation
    would scale that up to the size of the others, for the denoiser to learn.
    """
    tokens, attributes = denoiser.encode_images(
        common.load_state(work / "vae.safetensors", new_vae(SHAPES)), SHAPES.draw(work), SHAPES.images
    )
    pixels = tokens.reshape(-1, CHANNELS, 4)
    mean = pixels.mean((0, 2))
    centred = pixels - mean[:, None]
    print(f"latents: mean {mean}, deviations {pixels.std((0, 2))}, shared {centred.std()}")
    std = jnp.full(CHANNELS, centred.std())
    normalised = (centred / std[:, None]).reshape(tokens.shape)
    save_file({"tokens": normalised, "attributes": attributes, "mean": mean, "std": std}, work / "latents.safetensors")


def make_embeddings(work: Path) -> None:
    """Embeds every caption, then the empty prompt: [·, T, D], and their lengths, [·]."""
    folder = work / "text" / "text_encoder"
    config = schema.parse(Qwen2_5VLConfig, read_json(folder / "config.json"), str(folder))
    graphdef, abstract = nnx.split(QWEN2_5_VL.abstract(config))
    state = import_tensors(text_table, read_folder(folder), abstract)
    ids, ends = token_ids(load_tokenizer(work / "text" / "tokenizer"), [*map(str, SHAPES.captions.all()), ""])
    states = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, ids)
    embedded = {"text": states[:, QwenPrompts.BEFORE :], "lengths": jnp.asarray(ends - QwenPrompts.BEFORE, jnp.int32)}
    save_file(embedded, work / "embeddings.safetensors")


class Data(denoiser.EmbeddedData):
    def conditioning(self, caption: jax.Array, guidance: jax.Array) -> QwenImageConditioning:
        positions = packing.centred_positions(denoiser.GRID, denoiser.GRID)
        return QwenImageConditioning(self.embedded["text"][caption], self.embedded["lengths"][caption], positions)


def new_model(teacher: Teacher) -> ArcModel:
    """With gates and output at zero, as for FLUX.1."""
    rngs = nnx.Rngs(0)
    model = ArcModel(QwenImage(CONFIG, rngs=rngs), param_dtype=jnp.float32, rngs=rngs)
    (last,) = model.backbone.last_block.values()
    stacked = model.backbone.transformer_blocks
    for layer in (stacked.img_mod, stacked.txt_mod, last.img_mod, last.txt_mod, model.output.norm_out):
        layer.linear.kernel[...] = jnp.zeros_like(layer.linear.kernel[...])
    model.output.proj_out.kernel[...] = jnp.zeros_like(model.output.proj_out.kernel[...])
    return model


def make_denoiser(work: Path) -> None:
    denoiser.make_denoiser(work, SHAPES, Data.load, new_model)


def assemble(work: Path) -> None:
    """Writes `work`/tiny-qwen: transformer and VAE in bfloat16, the text encoder in float32."""
    out = start_folder(work, SHAPES.captions, "tiny-qwen", PIPELINE, "Qwen2Tokenizer")
    model = common.load_state(work / "denoiser.safetensors", new_model(SHAPES))
    config = CONFIGS["transformer"] | dataclasses.asdict(CONFIG) | {"out_channels": CHANNELS}
    write_component(out / "transformer", config, transformer_table, nnx.state(model), ml_dtypes.bfloat16)

    latents = load_file(work / "latents.safetensors")
    model = common.load_state(work / "vae.safetensors", new_vae(SHAPES))
    stats = {f"latents_{name}": latents[name].tolist() for name in ("mean", "std")}
    config = CONFIGS["vae"] | dataclasses.asdict(VAE) | stats
    write_component(out / "vae", config, vae_table, nnx.state(model), ml_dtypes.bfloat16)
    print_size(out)
