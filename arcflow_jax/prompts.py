"""Prompts in, conditioning out: the text side of each pipeline, with its frozen encoders."""

# B prompts, N image tokens, T text tokens

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from arcflow_jax.errors import UserError
from arcflow_jax.latents import centred_positions, position_ids
from arcflow_jax.model_directory import ModelDirectory
from arcflow_jax.models.flux import FluxConditioning
from arcflow_jax.models.qwen_image import QwenImageConditioning
from arcflow_jax.offload import Weights
from arcflow_jax.sharding import batched, replicated, state_shardings
from arcflow_jax.tokenizers import load_tokenizer, token_length, tokenize


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file, one a line; blank lines do not count. Raises UserError if there are none."""
    try:
        with open(path, encoding="utf-8") as file:
            prompts = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {error}") from None
    if not prompts:
        raise UserError(f"{path} holds no prompts: it has to have one a line")
    return prompts


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises UserError if there is no prompt, or an empty one."""
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty: say in words what the picture should show")


@functools.partial(jax.jit, static_argnames="graphdef")
def _apply(graphdef: nnx.GraphDef, state: nnx.State, ids: jax.Array) -> Any:
    return nnx.merge(graphdef, state)(ids)


class Encoder:
    """A frozen text encoder with its tokenizer; the weights are kept elsewhere."""

    def __init__(self, directory: ModelDirectory, component: str, tokenizer: str, dtype: Any, most: int = 512):
        self.graphdef, self.abstract = nnx.split(directory.abstract(component, dtype))
        self.tokenizer = load_tokenizer(directory.path / tokenizer)
        self.length = token_length(self.tokenizer, most)

    def __call__(self, state: nnx.State, prompts: Sequence[str], sharding: jax.sharding.Sharding) -> tuple[Any, int]:
        """The encoder's outputs for the prompts, and how many of them were too long and were cut."""
        ids, cut = tokenize(self.tokenizer, prompts, self.length)
        return _apply(self.graphdef, state, jax.device_put(ids, sharding)), cut


class FluxPrompts:
    """FLUX.1's: T5 for the tokens, CLIP for the pooled vector.

    Args:
      directory: a converted model.
      dtype: that the encoders compute in.
      mesh: over which weights and batch are split.
      offload: whether the weights leave the device when the prompts are encoded (see `offload.Weights`).
    """

    def __init__(self, directory: ModelDirectory, dtype: Any, mesh: Mesh, offload: bool = False):
        self.clip = Encoder(directory, "text_encoder", "tokenizer", dtype)
        self.t5 = Encoder(directory, "text_encoder_2", "tokenizer_2", dtype)
        self.weights = Weights(
            tuple(
                directory.load(component, encoder.abstract, state_shardings(mesh, encoder.abstract))
                for component, encoder in (("text_encoder", self.clip), ("text_encoder_2", self.t5))
            ),
            offload,
        )
        self.guided = directory.geometry("transformer").guidance_embeds
        self.mesh = mesh

    def __call__(self, prompts: Sequence[str], *, guidance: float, rows: int, columns: int) -> FluxConditioning:
        """Conditioning of B prompts for pictures of rows × columns tokens.

        Args:
          guidance: scale that the guidance embedding is fed; without effect on a checkpoint that has none.
        """
        return self.batches([prompts], guidance=guidance, rows=rows, columns=columns)[0]

    def batches(
        self, batches: Sequence[Sequence[str]], *, guidance: float, rows: int, columns: int
    ) -> list[FluxConditioning]:
        """The same for several batches one after the other."""

        def encode(states: tuple[nnx.State, nnx.State], prompts: Sequence[str]) -> FluxConditioning:
            clip, t5 = states
            split = len(prompts) % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]) == 0
            sharding = batched(self.mesh) if split else replicated(self.mesh)
            (_, pooled), _ = self.clip(clip, prompts, sharding)
            text, _ = self.t5(t5, prompts, sharding)
            scales = jax.device_put(np.full(len(prompts), guidance, np.float32), sharding) if self.guided else None
            return FluxConditioning(text, pooled, scales, jnp.asarray(position_ids(rows, columns)))

        return self.weights.run(lambda states: [encode(states, prompts) for prompts in batches])


class QwenPrompts:
    """Qwen-Image's: Qwen2.5-VL's states of a prompt, who is asked to describe a picture in that prompt's words.

    Args:
      directory, dtype, mesh, offload: as for `FluxPrompts`.

    Raises:
      UserError: if the tokenizer has no room for a prompt.
    """

    TEMPLATE = (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    BEFORE = 34  # tokens of the template before the prompt, whose states are dropped
    TOKENS = 512  # of a prompt and the template after it, as the students were trained with

    def __init__(self, directory: ModelDirectory, dtype: Any, mesh: Mesh, offload: bool = False):
        self.encoder = Encoder(directory, "text_encoder", "tokenizer", dtype, most=self.BEFORE + self.TOKENS)
        if self.encoder.length <= self.BEFORE:
            raise UserError(
                f"{directory.path / 'tokenizer'}: model_max_length is {self.encoder.length}, but the template around "
                f"a prompt alone has more than {self.BEFORE} tokens"
            )
        abstract = self.encoder.abstract
        self.weights = Weights(directory.load("text_encoder", abstract, state_shardings(mesh, abstract)), offload)
        self.mesh = mesh

    def __call__(self, prompts: Sequence[str], *, guidance: float, rows: int, columns: int) -> QwenImageConditioning:
        """Conditioning of B prompts for pictures of rows × columns tokens.

        Args:
          guidance: without effect, for there is no guidance embedding.
        """
        return self.batches([prompts], guidance=guidance, rows=rows, columns=columns)[0]

    def batches(
        self, batches: Sequence[Sequence[str]], *, guidance: float, rows: int, columns: int
    ) -> list[QwenImageConditioning]:
        """The same for several batches one after the other."""

        def encode(state: nnx.State, prompts: Sequence[str]) -> QwenImageConditioning:
            split = len(prompts) % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]) == 0
            sharding = batched(self.mesh) if split else replicated(self.mesh)
            requests = [self.TEMPLATE.format(prompt) for prompt in prompts]
            ids, _ = tokenize(self.encoder.tokenizer, requests, self.encoder.length)
            padding = ids[:, ::-1] == self.encoder.tokenizer.pad_token_id  # from the end
            lengths = ids.shape[1] - self.BEFORE - np.argmin(padding, axis=1)
            text = _apply(self.encoder.graphdef, state, jax.device_put(ids, sharding))[:, self.BEFORE :]
            lengths = jax.device_put(lengths.astype(np.int32), sharding)
            return QwenImageConditioning(text, lengths, jnp.asarray(centred_positions(rows, columns)))

        return self.weights.run(lambda state: [encode(state, prompts) for prompts in batches])


# By the pipeline class that model_index.json names
PROMPTS = {"FluxPipeline": FluxPrompts, "QwenImagePipeline": QwenPrompts}
