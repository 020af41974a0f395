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

from arcflow_jax.distributed import from_part
from arcflow_jax.errors import UserError
from arcflow_jax.latents import position_ids
from arcflow_jax.model_directory import ModelDirectory
from arcflow_jax.models.flux import FluxConditioning
from arcflow_jax.offload import Weights
from arcflow_jax.sharding import state_shardings
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

    def __init__(self, directory: ModelDirectory, component: str, tokenizer: str, dtype: Any):
        self.graphdef, self.abstract = nnx.split(directory.abstract(component, dtype))
        self.tokenizer = load_tokenizer(directory.path / tokenizer)
        self.length = token_length(self.tokenizer)

    def __call__(self, state: nnx.State, prompts: Sequence[str], mesh: Mesh) -> tuple[Any, int]:
        """The encoder's outputs for the prompts of all processes, and how many of this one's were too long and cut."""
        ids, cut = tokenize(self.tokenizer, prompts, self.length)
        return _apply(self.graphdef, state, from_part(ids, mesh)), cut


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
          prompts: on several processes, each one's own (see `distributed.local_part`); B counts all.
          guidance: scale that the guidance embedding is fed; without effect on a checkpoint that has none.
        """
        return self.batches([prompts], guidance=guidance, rows=rows, columns=columns)[0]

    def batches(
        self, batches: Sequence[Sequence[str]], *, guidance: float, rows: int, columns: int
    ) -> list[FluxConditioning]:
        """The same for several batches one after the other."""

        def encode(states: tuple[nnx.State, nnx.State], prompts: Sequence[str]) -> FluxConditioning:
            clip, t5 = states
            (_, pooled), _ = self.clip(clip, prompts, self.mesh)
            text, _ = self.t5(t5, prompts, self.mesh)
            scales = from_part(np.full(len(prompts), guidance, np.float32), self.mesh) if self.guided else None
            return FluxConditioning(text, pooled, scales, jnp.asarray(position_ids(rows, columns)))

        return self.weights.run(lambda states: [encode(states, prompts) for prompts in batches])


# By the pipeline class that model_index.json names
PROMPTS = {"FluxPipeline": FluxPrompts}
