"""The tiny teacher's text encoders, trained until a linear head reads a caption's attributes from their outputs.

With a frozen random encoder the denoiser would have to learn to read. These two are trained with linear heads, which
are thrown away afterwards. The heads predict every attribute of the caption, or that it is omitted, from CLIP's
pooled vector and from each of T5's tokens.
"""

# B batch, N tokens, D width, A attributes

from __future__ import annotations

import dataclasses
import operator
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file

from arcflow_jax.convert.engine import export_tensors
from arcflow_jax.convert.text import clip as clip_table
from arcflow_jax.convert.text import t5 as t5_table
from arcflow_jax.data.tokenizers import Tokenizer, load_tokenizer, tokenize
from arcflow_jax.demo.captions import Captions
from arcflow_jax.networks.layers import Linear
from arcflow_jax.networks.text.clip import CLIPTextConfig, CLIPTextEncoder
from arcflow_jax.networks.text.t5 import T5Config, T5Encoder
from arcflow_jax.storage.atomic import whole_directory
from arcflow_jax.storage.files import write_json
from tools.tiny_teacher import common
from tools.tiny_teacher.teacher import Teacher
from tools.tiny_teacher.tokenizers import CLIP_LENGTH, T5_LENGTH, make_clip_tokenizer, make_t5_tokenizer

EMPTY_SHARE = 0.075  # copies of the empty prompt, which guidance needs, per caption
ACCURACY = 0.999
CHECKED = 2_048  # prompts at most that the accuracy is measured on


def answers_of(captions: Captions[Any]) -> list[int]:
    """The number of answers for each attribute; the first is "omitted"."""
    return [len(values) + 1 for values in captions.values.values()]


def new_clip(tokenizer: Tokenizer, width: int, rngs: nnx.Rngs) -> CLIPTextEncoder:
    config = CLIPTextConfig(
        vocab_size=tokenizer.backend.get_vocab_size(),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        eos_token_id=tokenizer.backend.token_to_id("<|endoftext|>"),
    )
    return CLIPTextEncoder(config, rngs=rngs)


def new_t5(tokenizer: Tokenizer, width: int, rngs: nnx.Rngs) -> T5Encoder:
    config = T5Config(
        vocab_size=tokenizer.backend.get_vocab_size(),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
    )
    return T5Encoder(config, rngs=rngs)


class Probed(nnx.Module):
    """An encoder with its linear heads, side by side in one layer."""

    def __init__(self, encoder: nnx.Module, width: int, answers: int, rngs: nnx.Rngs):
        self.encoder = encoder
        self.heads = Linear(width, answers, rngs=rngs)


def train_encoder(
    encoder: nnx.Module,
    ids: np.ndarray,  # [captions, N]
    answers: np.ndarray,  # [captions, A]
    counts: list[int],  # of answers, per attribute
    features: Callable[[nnx.Module, jax.Array], jax.Array],  # (encoder, ids [B, N]) → [B, ..., D]
    *,
    seed: int,
    width: int,  # D
    scaled: Sequence[str] = ("final_layer_norm",),
    steps: int = 800,
    batch: int = 128,
    peak: float = 3e-3,
    every: int = 200,
    result: Path | None = None,  # a file; resumes from beside it
    least: float = ACCURACY,
) -> nnx.Module:
    """The trained encoder. The weights of the layers `scaled`, which the features are linear in, are divided so that
    `features` have unit mean square."""
    graphdef, state = nnx.split(Probed(encoder, width, sum(counts), nnx.Rngs(seed)))
    cuts = np.cumsum(counts)[:-1]

    def logits(state: nnx.State, ids: jax.Array) -> list[jax.Array]:  # per attribute, [B, ..., answers]
        probed = nnx.merge(graphdef, state)
        return jnp.split(probed.heads(features(probed.encoder, ids)), cuts, axis=-1)

    def loss(state: nnx.State, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        drawn = jax.random.randint(key, (batch,), 0, len(ids))
        value = 0.0
        for scores, right in zip(logits(state, jnp.asarray(ids)[drawn]), jnp.asarray(answers)[drawn].T, strict=True):
            right = jnp.broadcast_to(right, scores.T.shape[1:]).T  # [B, ...]: the same for every token
            value += optax.softmax_cross_entropy_with_integer_labels(scores, right).mean()
        return value, {"loss": value}

    def accuracy(state: nnx.State) -> float:  # share of right answers for the worst attribute
        answered = jax.jit(logits)(state, ids[checked])
        return min(
            float((right == scores.argmax(-1).T).mean())
            for scores, right in zip(answered, answers[checked].T, strict=True)
        )

    order = np.random.default_rng(seed).permutation(len(ids)) if len(ids) > CHECKED else np.arange(len(ids))
    checked = order[:CHECKED]
    state = common.train(loss, state, steps=steps, peak=peak, every=every, seed=seed, result=result)
    reached = accuracy(state)
    print(f"{reached:.4f} of the worst attribute's answers are right")
    if reached < least:
        raise RuntimeError(f"only {reached:.4f} of an attribute's answers are right, needs {least}")
    encoder = nnx.merge(graphdef, state).encoder
    scale = jnp.sqrt(jnp.square(features(encoder, ids[checked])).mean())
    for layer in scaled:
        state = nnx.state(operator.attrgetter(layer)(encoder))
        for weight in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable)):
            weight[...] = weight[...] / scale
    return encoder


def write_encoder(
    folder: Path,
    config: dict[str, Any],
    table: Any,
    encoder: nnx.Module,
    dtype: str,
    unread: Mapping[str, np.ndarray] | None = None,  # tensors that the checkpoint has besides
) -> None:
    """Writes an encoder's folder in transformers' layout.

    Its config.json says float32 for any dtype of the file, for the computation: in a pipeline loaded without a dtype,
    diffusers computes the transformer in float32, and needs the same here.
    """
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config | {"dtype": "float32"})
    exported = export_tensors(table, nnx.state(encoder)) | dict(unread or {})
    tensors = {name: array.astype(jnp.dtype(dtype)) for name, array in exported.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_clip(folder: Path, tokenizer: Tokenizer, encoder: CLIPTextEncoder, dtype: str = "float32") -> None:
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "projection_dim": encoder.config.hidden_size,
        "bos_token_id": tokenizer.backend.token_to_id("<|startoftext|>"),
        "pad_token_id": tokenizer.pad_token_id,
        **dataclasses.asdict(encoder.config),
    }
    write_encoder(folder, config, clip_table, encoder, dtype)


def write_t5(folder: Path, tokenizer: Tokenizer, encoder: T5Encoder, dtype: str = "float32") -> None:
    config = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **T5Config.REQUIRED,
        "is_encoder_decoder": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.backend.token_to_id("</s>"),
        **dataclasses.asdict(encoder.config),
    }
    write_encoder(folder, config, t5_table, encoder, dtype)


def prompts_and_answers(captions: Captions[Any]) -> tuple[list[str], np.ndarray]:
    """Every caption and the empty prompts, and the right answers for each, [·, A]."""
    every = captions.all()
    prompts = [*map(str, every), *[""] * int(EMPTY_SHARE * len(every))]
    answers = np.zeros((len(prompts), len(captions.values)), np.int32)
    answers[: len(every)] = np.stack([caption.as_array() for caption in every]) + 1
    return prompts, answers


def make_text(work: Path, teacher: Teacher, seed: int = 0) -> None:
    """Writes tokenizer, tokenizer_2, text_encoder and text_encoder_2; for the shapes a minute on two CPU cores."""
    words, counts = teacher.captions.words(), answers_of(teacher.captions)
    prompts, answers = prompts_and_answers(teacher.captions)
    shutil.rmtree(work / "text", ignore_errors=True)
    with whole_directory(work / "text", needed=0) as aside:
        make_clip_tokenizer(aside / "tokenizer", words)
        tokenizer = load_tokenizer(aside / "tokenizer")
        ids, _ = tokenize(tokenizer, prompts, CLIP_LENGTH)
        width = teacher.transformer.pooled_projection_dim
        clip = new_clip(tokenizer, width, nnx.Rngs(seed))
        clip = train_encoder(
            clip,
            ids,
            answers,
            counts,
            lambda encoder, ids: encoder(ids)[1],
            seed=seed,
            width=width,
            steps=teacher.text_steps,
        )
        write_clip(aside / "text_encoder", tokenizer, clip, teacher.text_dtype)

        make_t5_tokenizer(aside / "tokenizer_2", words)
        tokenizer = load_tokenizer(aside / "tokenizer_2")
        ids, _ = tokenize(tokenizer, prompts, T5_LENGTH)
        width = teacher.transformer.joint_attention_dim
        t5 = new_t5(tokenizer, width, nnx.Rngs(seed))
        t5 = train_encoder(
            t5,
            ids,
            answers,
            counts,
            lambda encoder, ids: encoder(ids),
            seed=seed,
            width=width,
            steps=teacher.text_steps,
        )
        write_t5(aside / "text_encoder_2", tokenizer, t5, teacher.text_dtype)
