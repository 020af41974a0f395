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
from arcflow_jax.latents import position_ids
from arcflow_jax.model_directory import ModelDirectory
from arcflow_jax.models.flux import FluxConditioning
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
    """A frozen text encoder with its tokenizer."""

    def __init__(self, directory: ModelDirectory, component: str, tokenizer: str, dtype: Any, mesh: Mesh):
        self.graphdef, abstract = nnx.split(directory.abstract(component, dtype))
        self.state = directory.load(component, abstract, state_shardings(mesh, abstract))
        self.tokenizer = load_tokenizer(directory.path / tokenizer)
        self.length = token_length(self.tokenizer)

    def __call__(self, prompts: Sequence[str], sharding: jax.sharding.Sharding) -> tuple[Any, int]:
        """The encoder's outputs for the prompts, and how many of them were too long and were cut."""
        ids, cut = tokenize(self.tokenizer, prompts, self.length)
        return _apply(self.graphdef, self.state, jax.device_put(ids, sharding)), cut


class FluxPrompts:
    """FLUX.1's: T5 for the tokens, CLIP for the pooled vector.

    Args:
      directory: a converted model.
      dtype: that the encoders compute in.
      mesh: over which weights and batch are split.
    """

    def __init__(self, directory: ModelDirectory, dtype: Any, mesh: Mesh):
        self.clip = Encoder(directory, "text_encoder", "tokenizer", dtype, mesh)
        self.t5 = Encoder(directory, "text_encoder_2", "tokenizer_2", dtype, mesh)
        self.guided = directory.geometry("transformer").guidance_embeds
        self.mesh = mesh

    def __call__(self, prompts: Sequence[str], *, guidance: float, rows: int, columns: int) -> FluxConditioning:
        """Conditioning of B prompts for pictures of rows × columns tokens.

        Args:
          guidance: scale that the guidance embedding is fed; without effect on a checkpoint that has none.
        """
        split = len(prompts) % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]) == 0
        sharding = batched(self.mesh) if split else replicated(self.mesh)
        (_, pooled), _ = self.clip(prompts, sharding)
        text, _ = self.t5(prompts, sharding)
        scales = jax.device_put(np.full(len(prompts), guidance, np.float32), sharding) if self.guided else None
        return FluxConditioning(text, pooled, scales, jnp.asarray(position_ids(rows, columns)))


# By the pipeline class that model_index.json names
PROMPTS = {"FluxPipeline": FluxPrompts}
