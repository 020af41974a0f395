"""Prompts to conditioning: what all families share."""

# B prompts, N image tokens, T text tokens

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from arcflow_jax.data.tokenizers import load_tokenizer, token_length, tokenize
from arcflow_jax.networks.conditioning import Conditioning
from arcflow_jax.networks.style import Applied, beside
from arcflow_jax.parallel.offload import Offload, Weights, running_shardings
from arcflow_jax.parallel.processes import from_rows


class Model(Protocol):
    """The part of a converted model (`models.model_directory.ModelDirectory`) that is used here."""

    @property
    def path(self) -> Path: ...

    def tokenizer(self, name: str) -> Path:
        """The folder of a tokenizer."""
        ...

    def config(self, component: str) -> Any:
        """The config dataclass of a component."""
        ...

    def abstract(self, component: str, dtype: Any = None) -> nnx.Module:
        """The component's network with shapes in place of arrays."""
        ...

    def load(self, component: str, abstract_state: nnx.State, shardings: Any = None) -> nnx.State:
        """The component's weights."""
        ...


@functools.partial(jax.jit, static_argnames="graphdef")
def apply_encoder(graphdef: nnx.GraphDef, state: nnx.State, ids: jax.Array) -> Any:
    """The outputs of a text encoder for token ids [B, T]."""
    return nnx.merge(graphdef, state)(ids)


class Encoder:
    """A frozen text encoder with its tokenizer, without the weights.

    Args:
      model: the converted model.
      component, tokenizer: their folders in it.
      dtype: of the computation.
      max_tokens: length that prompts are cut and padded to, unless the tokenizer has a smaller maximum.

    Attributes:
      style: the style LoRAs that change it.
    """

    def __init__(self, model: Model, component: str, tokenizer: str, dtype: Any, max_tokens: int):
        self.graphdef, self.abstract = nnx.split(model.abstract(component, dtype))
        self.style: Applied | None = None
        self.tokenizer = load_tokenizer(model.tokenizer(tokenizer))
        self.length = token_length(self.tokenizer, max_tokens)
        # So that a thread can tokenize the next batch, see `PromptEncoder.prepare`
        self._ids = functools.lru_cache(maxsize=4)(lambda prompts: tokenize(self.tokenizer, prompts, self.length))

    def ids(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:  # [B, T] int32, [B] bool
        """Token ids, and which prompts were too long and were cut."""
        return self._ids(tuple(prompts))

    def __call__(self, state: nnx.State, ids: np.ndarray, mesh: Mesh) -> Any:
        """The encoder's outputs for token ids [B, T]."""
        return apply_encoder(*beside(self.graphdef, state, self.style), from_rows(ids, mesh))


class PromptEncoder:
    """The loaded text encoders of a model, which turn prompts into conditioning.

    A family's own class defines `_embed`, `conditioning` and `abstract_conditioning`.

    Args:
      model: the converted model.
      dtype: of the encoders' computation.
      mesh: over which weights and batch are split.
      offload: what stays in host memory (see `offload.Offload`).

    Attributes:
      cut: how many of this process's prompts so far had more tokens than the encoder takes, and were cut.
    """

    TEMPLATE: ClassVar[str] = "{}"  # what the encoders read of a prompt
    ENCODERS: ClassVar[dict[str, str]]  # component → folder of its tokenizer
    MAX_TOKENS: ClassVar[int] = 512  # the most that prompts are padded or cut to

    def __init__(self, model: Model, dtype: Any, mesh: Mesh, offload: Offload | None = None):
        self.model, self.mesh, self.cut = model, mesh, 0
        self.encoders = {
            component: Encoder(model, component, tokenizer, dtype, self.MAX_TOKENS)
            for component, tokenizer in self.ENCODERS.items()
        }
        states = {
            component: model.load(component, encoder.abstract, running_shardings(mesh, encoder.abstract, offload))
            for component, encoder in self.encoders.items()
        }
        self.weights = Weights(states, offload is not None)

    def __call__(self, prompts: Sequence[str], *, guidance: float, rows: int, columns: int) -> Conditioning:
        """Conditioning of B prompts for images of rows × columns tokens.

        Args:
          prompts: on several processes, this process's own (see `processes.local_rows`); B counts all.
          guidance: input of the guidance embedding; ignored by a transformer without one.
        """
        return self.batches([prompts], guidance=guidance, rows=rows, columns=columns)[0]

    def batches(
        self, batches: Sequence[Sequence[str]], *, guidance: float, rows: int, columns: int
    ) -> list[Conditioning]:
        """The conditioning of several batches, one after the other."""
        embedded = self.weights.run(lambda states: [self._embed(states, prompts)[0] for prompts in batches])
        settings = {"guidance": guidance, "rows": rows, "columns": columns}
        return [self.conditioning(self.model, self.mesh, each, **settings) for each in embedded]

    def prepare(self, prompts: Sequence[str]) -> None:
        """Does for a batch what needs no device, so that the call with the same prompts finds it done."""
        for encoder in self.encoders.values():
            encoder.ids([self.TEMPLATE.format(prompt) for prompt in prompts])

    def embed(self, prompts: Sequence[str]) -> tuple[dict[str, jax.Array], np.ndarray]:
        """The encoders' outputs for B prompts, each array [B, ...], and which prompts were cut, [B]."""
        return self.weights.run(lambda states: self._embed(states, prompts))

    def _embed(
        self, states: Mapping[str, nnx.State], prompts: Sequence[str]
    ) -> tuple[dict[str, jax.Array], np.ndarray]:
        """`embed`, given the encoders' weights by component. Adds to `cut`."""
        raise NotImplementedError

    @staticmethod
    def conditioning(
        model: Model, mesh: Mesh, embedded: Mapping[str, jax.Array], *, guidance: float, rows: int, columns: int
    ) -> Conditioning:
        """Conditioning from the outputs of `embed`, which may come from a cache."""
        raise NotImplementedError

    @staticmethod
    def abstract_conditioning(model: Model, mesh: Mesh, batch: int, tokens: int, dtype: Any) -> Conditioning:
        """Shapes and shardings of the conditioning of a batch of images of N tokens. Reads no weights."""
        raise NotImplementedError
