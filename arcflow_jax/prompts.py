"""Prompts in, conditioning out: the text side of each pipeline, with its frozen encoders."""

# B prompts, N image tokens, T text tokens

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from arcflow_jax.distributed import from_part
from arcflow_jax.errors import UserError
from arcflow_jax.latents import centred_positions, position_ids
from arcflow_jax.model_directory import ModelDirectory
from arcflow_jax.models.flux import FluxConditioning
from arcflow_jax.models.qwen_image import QwenImageConditioning
from arcflow_jax.offload import Weights
from arcflow_jax.sharding import batched, replicated, state_shardings
from arcflow_jax.tokenizers import load_tokenizer, token_length, tokenize


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises UserError if there is no prompt, or an empty one."""
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty: say in words what the picture should show")


@functools.partial(jax.jit, static_argnames="graphdef")
def _apply(graphdef: nnx.GraphDef, state: nnx.State, ids: jax.Array) -> Any:
    return nnx.merge(graphdef, state)(ids)


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Of a batch: split over the data axes or, where they do not divide it, whole on each device."""
    return replicated(mesh) if rows % (mesh.shape["data"] * mesh.shape["fsdp"]) else batched(mesh)


class Encoder:
    """A frozen text encoder with its tokenizer; the weights are kept elsewhere."""

    def __init__(self, directory: ModelDirectory, component: str, tokenizer: str, dtype: Any, most: int = 512):
        self.graphdef, self.abstract = nnx.split(directory.abstract(component, dtype))
        self.tokenizer = load_tokenizer(directory.path / tokenizer)
        self.length = token_length(self.tokenizer, most)

    def __call__(self, state: nnx.State, prompts: Sequence[str], mesh: Mesh) -> tuple[Any, np.ndarray]:
        """The encoder's outputs for the prompts, and which of them were too long and were cut, [B]."""
        ids, cut = tokenize(self.tokenizer, prompts, self.length)
        return _apply(self.graphdef, state, from_part(ids, mesh)), cut


class PromptEncoder:
    """The text side of a pipeline. Each kind says in `_embed` and `conditioning` what its encoders make, and of what.

    Attributes:
      weights: of the encoders, by the names in `ENCODERS`.
      cut: how many prompts were too long up to now, and were cut.
    """

    ENCODERS: ClassVar[dict[str, str]]  # component → folder of its tokenizer
    directory: ModelDirectory
    mesh: Mesh
    weights: Weights
    cut: int

    def __call__(self, prompts: Sequence[str], *, guidance: float, rows: int, columns: int) -> Any:
        """Conditioning of B prompts for pictures of rows × columns tokens.

        Args:
          prompts: on several processes, each one's own (see `distributed.local_part`); B counts all.
          guidance: scale that the guidance embedding is fed; without effect on a checkpoint that has none.
        """
        return self.batches([prompts], guidance=guidance, rows=rows, columns=columns)[0]

    def batches(self, batches: Sequence[Sequence[str]], *, guidance: float, rows: int, columns: int) -> list[Any]:
        """The same for several batches one after the other."""
        embedded = self.weights.run(lambda states: [self._embed(states, prompts)[0] for prompts in batches])
        settings = {"guidance": guidance, "rows": rows, "columns": columns}
        return [self.conditioning(self.directory, self.mesh, each, **settings) for each in embedded]

    def embed(self, prompts: Sequence[str]) -> tuple[dict[str, jax.Array], np.ndarray]:
        """What the encoders make of B prompts, each array [B, ...], and which prompts were cut, [B]."""
        return self.weights.run(lambda states: self._embed(states, prompts))


class FluxPrompts(PromptEncoder):
    """FLUX.1's: T5 for the tokens, CLIP for the pooled vector.

    Args:
      directory: a converted model.
      dtype: that the encoders compute in.
      mesh: over which weights and batch are split.
      offload: whether the weights leave the device when the prompts are encoded (see `offload.Weights`).

    Attributes:
      cut: how many of the prompts so far had more tokens than T5 takes, and were cut. (CLIP takes 77 only, for a
        summary of what T5 reads in full.)
    """

    ENCODERS: ClassVar = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

    def __init__(self, directory: ModelDirectory, dtype: Any, mesh: Mesh, offload: bool = False):
        self.directory, self.mesh = directory, mesh
        self.clip, self.t5 = (Encoder(directory, *names, dtype) for names in self.ENCODERS.items())
        self.weights = Weights(
            tuple(
                directory.load(component, encoder.abstract, state_shardings(mesh, encoder.abstract))
                for component, encoder in zip(self.ENCODERS, (self.clip, self.t5), strict=True)
            ),
            offload,
        )
        self.cut = 0

    def _embed(
        self, states: tuple[nnx.State, nnx.State], prompts: Sequence[str]
    ) -> tuple[dict[str, jax.Array], np.ndarray]:
        clip, t5 = states
        (_, pooled), _ = self.clip(clip, prompts, self.mesh)
        text, cut = self.t5(t5, prompts, self.mesh)
        self.cut += int(cut.sum())
        return {"text": text, "pooled": pooled}, cut

    @staticmethod
    def conditioning(
        directory: ModelDirectory,
        mesh: Mesh,
        embedded: Mapping[str, jax.Array],
        *,
        guidance: float,
        rows: int,
        columns: int,
    ) -> FluxConditioning:
        """Conditioning from what `embed` gave, now or when a cache was written."""
        guided = directory.geometry("transformer").guidance_embeds
        batch = len(embedded["text"])
        scales = jnp.full(batch, guidance, jnp.float32, device=row_sharding(mesh, batch)) if guided else None
        positions = jnp.asarray(position_ids(rows, columns))
        return FluxConditioning(embedded["text"], embedded["pooled"], scales, positions)


class QwenPrompts(PromptEncoder):
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

    ENCODERS: ClassVar = {"text_encoder": "tokenizer"}

    def __init__(self, directory: ModelDirectory, dtype: Any, mesh: Mesh, offload: bool = False):
        self.directory, self.mesh = directory, mesh
        self.encoder = Encoder(directory, "text_encoder", "tokenizer", dtype, most=self.BEFORE + self.TOKENS)
        if self.encoder.length <= self.BEFORE:
            raise UserError(
                f"{directory.path / 'tokenizer'}: model_max_length is {self.encoder.length}, but the template around "
                f"a prompt alone has more than {self.BEFORE} tokens"
            )
        abstract = self.encoder.abstract
        self.weights = Weights(directory.load("text_encoder", abstract, state_shardings(mesh, abstract)), offload)
        self.cut = 0

    def _embed(self, state: nnx.State, prompts: Sequence[str]) -> tuple[dict[str, jax.Array], np.ndarray]:
        requests = [self.TEMPLATE.format(prompt) for prompt in prompts]
        ids, cut = tokenize(self.encoder.tokenizer, requests, self.encoder.length)
        padding = ids[:, ::-1] == self.encoder.tokenizer.pad_token_id  # from the end
        lengths = ids.shape[1] - self.BEFORE - np.argmin(padding, axis=1)
        text = _apply(self.encoder.graphdef, state, from_part(ids, self.mesh))[:, self.BEFORE :]
        self.cut += int(cut.sum())
        return {"text": text, "lengths": from_part(lengths.astype(np.int32), self.mesh)}, cut

    @staticmethod
    def conditioning(
        directory: ModelDirectory,
        mesh: Mesh,
        embedded: Mapping[str, jax.Array],
        *,
        guidance: float,
        rows: int,
        columns: int,
    ) -> QwenImageConditioning:
        """Conditioning from what `embed` gave, now or when a cache was written."""
        return QwenImageConditioning(
            embedded["text"], embedded["lengths"], jnp.asarray(centred_positions(rows, columns))
        )


# By the pipeline class that model_index.json names
PROMPTS = {"FluxPipeline": FluxPrompts, "QwenImagePipeline": QwenPrompts}
