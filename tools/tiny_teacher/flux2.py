"""The tiny teacher as a FLUX.2 [klein] base: the stages in which it differs from the bundled FLUX.1.

Its VAE needs no training: FLUX.2's encoder and decoder are FLUX.1's, with a 1×1 convolution after the one and before
the other. It is the bundled FLUX.1's, with convolutions that change nothing, and latent statistics of its own.

It uses classifier-free guidance, which needs no stage of its own: the network is trained with and without captions.
"""

# B batch, N image tokens, T text tokens, D width of the text encoder, C latent channels

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
from arcflow_jax.convert.backbones import flux2 as transformer_table
from arcflow_jax.convert.engine import export_tensors, import_tensors
from arcflow_jax.convert.text import qwen3 as text_table
from arcflow_jax.convert.vaes import flux2 as vae_table
from arcflow_jax.data.tokenizers import load_tokenizer, tokenize
from arcflow_jax.demo import ASSETS
from arcflow_jax.families import latents as packing
from arcflow_jax.families.flux2 import FAMILY, KleinPrompts
from arcflow_jax.networks.backbones.flux2 import Flux2, Flux2Conditioning, Flux2Config
from arcflow_jax.networks.student import ArcModel
from arcflow_jax.networks.text.qwen3 import READ, Qwen3Config, Qwen3Text
from arcflow_jax.storage.atomic import whole_directory
from arcflow_jax.storage.files import read_json
from arcflow_jax.storage.safetensors import read_folder
from tools.make_tiny_qwen import SPECIAL, make_tokenizer
from tools.tiny_teacher import common, denoiser, text
from tools.tiny_teacher.assemble import print_size, start_folder, write_component, write_tensors
from tools.tiny_teacher.shapes import SHAPES
from tools.tiny_teacher.teacher import Teacher

LENGTH = 32  # tokens; the template has 13, and the longest bundled prompt 11 words
WIDTH = 32  # D
TEXT_ENCODER = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": READ[-1] + 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
# What Qwen3's own makes of the messages of a user
CHAT_TEMPLATE = r"""
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
CONFIG = Flux2Config(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=len(READ) * WIDTH,
    guidance_embeds=False,
    axes_dims_rope=(8, 8, 8, 8),
)
EPSILON = 1e-4  # of the VAE's batch norm


def token_ids(tokenizer: Any, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the prompts in the pipeline's template, [B, T], complemented where they are padding; lengths, [B]."""
    ids, cut = tokenize(tokenizer, [KleinPrompts.TEMPLATE.format(prompt) for prompt in prompts], LENGTH)
    if cut.any():
        raise RuntimeError(f"{int(cut.sum())} prompts have more than {LENGTH} tokens")
    padding = ids == tokenizer.pad_token_id
    return np.where(padding, ~ids, ids), (~padding).sum(axis=1)


def make_text(work: Path, seed: int = 0) -> None:
    """Writes tokenizer and text_encoder. In a causal encoder only the last token has read the whole caption."""
    shutil.rmtree(work / "text", ignore_errors=True)
    with whole_directory(work / "text", needed=0) as aside:
        special = (*SPECIAL, "<think>", "</think>")
        vocabulary = make_tokenizer(
            aside / "tokenizer", KleinPrompts.TEMPLATE, LENGTH, special, chat_template=CHAT_TEMPLATE
        )
        tokenizer = load_tokenizer(aside / "tokenizer")
        prompts, answers = text.prompts_and_answers(SHAPES.captions)
        ids, _ = token_ids(tokenizer, prompts)
        config = TEXT_ENCODER | {"vocab_size": vocabulary}
        encoder = Qwen3Text(schema.parse(Qwen3Config, config, "text_encoder"), rngs=nnx.Rngs(seed))
        for output in (encoder.layers.self_attn.o_proj, encoder.layers.mlp.down_proj):
            output.kernel[...] /= (2 * READ[-1]) ** 0.5  # so that a deep network trains, as in GPT-2

        def features(encoder: Qwen3Text, ids: jax.Array) -> jax.Array:  # [B, T] -> [B, 3 D]
            last = (ids >= 0).sum(axis=1) - 1
            return jnp.take_along_axis(encoder(ids), last[:, None, None], axis=1)[:, 0]

        encoder = text.train_encoder(
            encoder,
            ids,
            answers,
            text.answers_of(SHAPES.captions),
            features,
            scaled=("embed_tokens", "layers.self_attn.o_proj", "layers.mlp.down_proj"),
            seed=seed,
            width=len(READ) * WIDTH,
            steps=SHAPES.text_steps,
            every=50,  # of 27 layers, a step takes longer
            result=work / "text-encoder.safetensors",
            least=0.9,  # of what one token says: the transformer reads all of them
        )
        first = "model.layers.0."  # the last layer, which nothing reads, has its shapes
        shapes = {
            name: array for name, array in export_tensors(text_table, nnx.state(encoder)).items() if first in name
        }
        unread = {name.replace(".0.", f".{READ[-1]}.", 1): np.zeros_like(array) for name, array in shapes.items()}
        unread["model.norm.weight"] = np.ones(WIDTH, np.float32)
        text.write_encoder(aside / "text_encoder", config, text_table, encoder, "bfloat16", unread)


def vae_tensors(mean: np.ndarray, variance: np.ndarray) -> dict[str, np.ndarray]:
    """The VAE's checkpoint with these statistics of its normalised latents, [4C] each."""

    def identity(channels: int) -> np.ndarray:
        return np.eye(channels, dtype=ml_dtypes.bfloat16)[:, :, None, None]

    trained = {name: np.asarray(tensor) for name, tensor in read_folder(ASSETS / "tiny-flux" / "vae").items()}
    channels = len(mean) // 4
    return trained | {
        "quant_conv.weight": identity(2 * channels),
        "quant_conv.bias": np.zeros(2 * channels, ml_dtypes.bfloat16),
        "post_quant_conv.weight": identity(channels),
        "post_quant_conv.bias": np.zeros(channels, ml_dtypes.bfloat16),
        "bn.running_mean": mean.astype(np.float32),
        "bn.running_var": variance.astype(np.float32),
        "bn.num_batches_tracked": np.array(SHAPES.images),
    }


def make_latents(work: Path) -> None:
    """As for FLUX.1, but with a mean for each feature of a token. The deviation is shared, as for Qwen-Image."""
    network, config = FAMILY.networks["vae"], vae_config()
    unscaled = vae_tensors(np.zeros(CONFIG.in_channels), np.full(CONFIG.in_channels, 1 - EPSILON))
    vae = network.build(schema.parse(network.config, config, "vae"), jnp.float32, nnx.Rngs(0))
    nnx.update(vae, import_tensors(vae_table, unscaled, nnx.state(vae), jnp.float32))
    tokens, attributes = denoiser.encode_images(vae, SHAPES.draw(work), SHAPES.images)
    mean = tokens.mean((0, 1))
    variance = jnp.full_like(mean, jnp.square(tokens - mean).mean())
    print(f"latents: mean {mean}, deviation {jnp.sqrt(variance[0]):.4f}")
    tokens = (tokens - mean) / jnp.sqrt(variance)
    statistics = {"mean": mean, "variance": variance - EPSILON}
    save_file({"tokens": tokens, "attributes": attributes, **statistics}, work / "latents.safetensors")


def vae_config() -> dict[str, Any]:
    """The config.json of the VAE."""
    of_flux = read_json(ASSETS / "tiny-flux" / "vae" / "config.json")
    for name in ("scaling_factor", "shift_factor", "force_upcast"):
        del of_flux[name]
    convolutions = {"use_quant_conv": True, "use_post_quant_conv": True}
    return of_flux | convolutions | {"_class_name": "AutoencoderKLFlux2", "batch_norm_eps": EPSILON}


def make_embeddings(work: Path) -> None:
    """Embeds every caption, then the empty prompt: [·, T, 3 D]."""
    folder, network = work / "text" / "text_encoder", FAMILY.networks["text_encoder"]
    graphdef, abstract = nnx.split(
        network.abstract(schema.parse(network.config, read_json(folder / "config.json"), ""))
    )
    state = import_tensors(text_table, read_folder(folder), abstract, jnp.float32)
    ids, _ = token_ids(load_tokenizer(work / "text" / "tokenizer"), [*map(str, SHAPES.captions.all()), ""])
    save_file(
        {"text": jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, ids)},
        work / "embeddings.safetensors",
    )


class Data(denoiser.EmbeddedData):
    def conditioning(self, caption: jax.Array, guidance: jax.Array) -> Flux2Conditioning:
        positions = jnp.pad(packing.position_ids(denoiser.GRID, denoiser.GRID), ((0, 0), (0, 1)))
        return Flux2Conditioning(self.embedded["text"][caption], None, positions)


def new_model(teacher: Teacher) -> ArcModel:
    """With gates and output at zero, as for FLUX.1."""
    rngs = nnx.Rngs(0)
    model = ArcModel(Flux2(CONFIG, rngs=rngs), bias=False, param_dtype=jnp.float32, rngs=rngs)
    backbone = model.backbone
    modulations = (
        backbone.double_stream_modulation_img,
        backbone.double_stream_modulation_txt,
        backbone.single_stream_modulation,
        model.output.norm_out,
    )
    for linear in (*(modulation.linear for modulation in modulations), model.output.proj_out):
        linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
    return model


def make_denoiser(work: Path) -> None:
    """In the first of the rounds of FLUX.1's: after it the judge reads all that the test prompts name."""
    once = dataclasses.replace(SHAPES, rounds=SHAPES.rounds[:1])
    denoiser.make_denoiser(work, once, Data.load, new_model)


def assemble(work: Path) -> None:
    """Writes `work`/tiny-flux2 in bfloat16, the VAE's statistics in float32."""
    out = start_folder(work, SHAPES.captions, "tiny-flux2", FAMILY.pipeline, "Qwen2TokenizerFast")
    model = common.load_state(work / "denoiser.safetensors", new_model(SHAPES))
    config = {"_class_name": "Flux2Transformer2DModel", **dataclasses.asdict(CONFIG)}
    write_component(out / "transformer", config, transformer_table, nnx.state(model), ml_dtypes.bfloat16)
    latents = load_file(work / "latents.safetensors")
    write_tensors(out / "vae", vae_config(), vae_tensors(np.asarray(latents["mean"]), np.asarray(latents["variance"])))
    print_size(out)
