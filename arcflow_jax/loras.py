"""A pipeline's style LoRAs: loaded, switched and unloaded, with the names that diffusers has for it."""

# L stacked layers, r LoRA rank

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from arcflow_jax import schema
from arcflow_jax.convert.style_lora import Update
from arcflow_jax.errors import UserError
from arcflow_jax.families.text import PromptEncoder
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.models.style_loras import read_style_lora
from arcflow_jax.networks import style
from arcflow_jax.networks.states import flatten, unflatten
from arcflow_jax.networks.style import Applied
from arcflow_jax.parallel.mesh import state_shardings
from arcflow_jax.parallel.offload import Weights
from arcflow_jax.schema import Offset

TRANSFORMER = "transformer"


@dataclasses.dataclass
class StyleLoRA:
    """A style LoRA that is loaded: its origin, its updates by component, and its strength, 0 if it is not active."""

    source: str
    updates: dict[str, list[Update]]
    weight: float


class StyleLoRAs:
    """The part of `ArcFlowPipeline` that has style LoRAs.

    They are computed beside the weights, whatever the weights' format, of teacher and student. Their parts for text
    encoders are applied as well.

    Attributes:
      loras: those that are loaded, by name.
    """

    directory: ModelDirectory
    mesh: Mesh
    dtype: Any
    offload: bool
    origin: dict[str, str]
    graphdef: nnx.GraphDef
    transformer: Weights
    prompt_encoder: PromptEncoder

    def __init__(self) -> None:
        self.loras: dict[str, StyleLoRA] = {}
        self.style: Applied | None = None  # of the transformer

    def load_lora_weights(self, path_or_id: str | Path, adapter_name: str | None = None, scale: float = 1.0) -> str:
        """Loads a style LoRA and adds it to those that are active. The first of its rank compiles the network anew.

        Args:
          path_or_id: a safetensors file; a folder with one; or a hub id, owner/name or owner/name/file.safetensors. In
            the formats that `convert.style_lora` lists.
          adapter_name: its name for `set_adapters`; by default "default_0", "default_1", …
          scale: its strength.

        Returns:
          Its name.

        Raises:
          UserError: as `models.style_loras.read_style_lora`, or if the name is taken.
        """
        name = adapter_name or next(
            name for i in range(len(self.loras) + 1) if (name := f"default_{i}") not in self.loras
        )
        if name in self.loras:
            raise UserError(f"a LoRA {name!r} is loaded already: choose another adapter_name, or unload_lora_weights()")
        components = {c: (network, self.directory.config(c)) for c, network in self.directory.networks.items()}
        updates = collections.defaultdict(list)
        for update in read_style_lora(path_or_id, components):
            updates[update.component].append(self._on_head(update))
        self.loras[name] = StyleLoRA(str(path_or_id), dict(updates), schema.converted(Offset, scale, "scale"))
        try:
            self._apply()
        except BaseException:  # out of memory, or interrupted: the LoRAs stay as they were
            del self.loras[name]
            raise
        return name

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Makes these LoRAs the active ones, with these strengths.

        Nothing is compiled, unless their ranks together exceed the largest so far, padded to 16, 32, 64, ….

        Args:
          adapter_weights: one for each, or one for all; by default 1.

        Raises:
          UserError: if a LoRA is not loaded, or the numbers of names and weights differ.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = [1.0] if adapter_weights is None else adapter_weights
        weights = list(weights) if isinstance(weights, Sequence) else [weights]
        weights = weights * len(names) if len(weights) == 1 else weights
        if len(weights) != len(names):
            raise UserError(f"adapter_weights has {len(weights)} numbers for {len(names)} LoRAs")
        if unknown := [name for name in names if name not in self.loras]:
            raise UserError(
                f"no LoRA {', '.join(map(repr, unknown))} is loaded, only {', '.join(map(repr, self.loras)) or 'none'}"
            )
        given = {
            name: schema.converted(Offset, weight, f"weight of {name}")
            for name, weight in zip(names, weights, strict=True)
        }
        for name, lora in self.loras.items():
            lora.weight = given.get(name, 0.0)
        self._apply()

    def unload_lora_weights(self) -> None:
        """Removes all style LoRAs: the pipeline is as it was before the first one, but for those that were fused."""
        self.loras = {}
        self.origin.pop("loras", None)
        self._set_styles({})

    def fuse_lora(self) -> None:
        """Adds the active LoRAs to the weights, rounded to their precision, and unloads them all.

        The network then costs what it costs without LoRA. There is no way back but to load the model again.

        Raises:
          UserError: if the weights are quantized, or offloaded.
        """
        styles = self._styles()
        for component in styles:
            if self.offload or (self.directory.quantization(component) is not None):
                why = "offloaded" if self.offload else "quantized"
                raise UserError(f"a LoRA cannot be fused into {why} weights: leave it beside them")
        encoders = self.prompt_encoder.weights.state
        for component, applied in styles.items():
            _, weights = self._plain(component)
            shardings = jax.tree.map(lambda x: x.sharding, weights)
            with jax.set_mesh(self.mesh):
                weights = jax.device_put(fuse(applied.graphdef, weights, applied.state), shardings)
            if component == TRANSFORMER:
                self.transformer.state = weights
            else:
                encoders[component] = weights
        fused = [names for key in ("fused", "loras") if (names := self.origin.get(key))]
        self.unload_lora_weights()
        if fused:
            self.origin["fused"] = ", ".join(fused)

    def _on_head(self, update: Update) -> Update:
        """A change of the teacher's output layer, as the student's head takes it; others as they are.

        The student has an output norm of its own, and predicts a curve, whose constant part changes.
        """
        part, _, layer = update.layer.partition(".")
        head = nnx.merge(self.graphdef, self.transformer.state).head if part == "output" else None
        if update.component != TRANSFORMER or head is None:
            return update
        if layer != "proj_out":
            return update._replace(layer=f"head.{layer}")
        projection, b = head.constant(update.b)
        return update._replace(layer=f"head.{projection}", b=b)

    def _apply(self) -> None:
        """Puts the active LoRAs beside the weights."""
        old, new = self._styles(), {}
        for component in {component for lora in self.loras.values() for component in lora.updates}:
            loaded = [update for lora in self.loras.values() for update in lora.updates.get(component, [])]
            active = [
                update._replace(scale=update.scale * lora.weight)
                for lora in self.loras.values()
                if lora.weight
                for update in lora.updates.get(component, [])
            ]
            new[component] = self._beside(component, {update.layer for update in loaded}, active, old.get(component))
        self._set_styles(new)
        self.origin.pop("loras", None)
        if active := [f"{lora.source}:{lora.weight:g}" for lora in self.loras.values() if lora.weight]:
            self.origin["loras"] = ", ".join(active)

    def _beside(self, component: str, layers: set[str], active: Sequence[Update], old: Applied | None) -> Applied:
        """The active updates of a component on all `layers`; with the graph definition of the old ones if it fits."""
        ranks: collections.Counter[tuple[str, int | None]] = collections.Counter()
        for update in active:
            ranks[update.layer, update.index] += update.a.shape[1]
        rank = style.padded(max(ranks.values(), default=1))
        if old is not None:
            shapes = {path: x.shape for path, x in flatten(old.state).items() if path.endswith(".a")}
            largest = max(shape[-1] for shape in shapes.values())
            rank = max(rank, largest)  # it does not shrink, so that going back to fewer LoRAs compiles nothing
            if rank > largest or not {f"{layer}.style.a" for layer in layers} <= shapes.keys():
                old = None
        if old is None:
            graphdef, weights = self._plain(component)
            old = style.styled(graphdef, weights, sorted(layers), rank)
        with jax.set_mesh(self.mesh):
            return Applied(old.graphdef, place(old.state, stacked(active, old.state, self.dtype), self.mesh))

    def _plain(self, component: str) -> tuple[nnx.GraphDef, nnx.State]:
        """A component's network without style LoRAs."""
        if component == TRANSFORMER:
            return self.graphdef, self.transformer.state
        return self.prompt_encoder.encoders[component].graphdef, self.prompt_encoder.weights.state[component]

    def _styles(self) -> dict[str, Applied]:
        """The style LoRAs of each component that has some."""
        encoders = {name: encoder.style for name, encoder in self.prompt_encoder.encoders.items()}
        return {
            name: applied for name, applied in ({TRANSFORMER: self.style} | encoders).items() if applied is not None
        }

    def _set_styles(self, styles: dict[str, Applied]) -> None:
        self.style = styles.get(TRANSFORMER)
        for name, encoder in self.prompt_encoder.encoders.items():
            encoder.style = styles.get(name)


def stacked(active: Sequence[Update], abstract: nnx.State, dtype: Any) -> dict[str, np.ndarray]:
    """A and B of all layers with style LoRAs, by dotted path: the updates side by side along the rank, then zeros.

    Scales are multiplied into B.
    """
    arrays = {path: np.zeros(variable.shape, dtype) for path, variable in flatten(abstract).items()}
    filled: collections.Counter[tuple[str, int | None]] = collections.Counter()
    for update in active:
        start = filled[update.layer, update.index]
        stop = filled[update.layer, update.index] = start + update.a.shape[1]
        a, b = (arrays[f"{update.layer}.style.{name}"] for name in "ab")
        a, b = (a, b) if update.index is None else (a[update.index], b[update.index])
        a[:, start:stop] = update.a
        b[start:stop] = update.b.astype(np.float32) * update.scale
    return arrays


def place(abstract: nnx.State, arrays: dict[str, np.ndarray], mesh: Mesh) -> nnx.State:
    """A state of these arrays, sharded as the network's own weights are."""
    state = unflatten(abstract, arrays)
    return jax.device_put(state, state_shardings(mesh, state))


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
def fuse(graphdef: nnx.GraphDef, state: nnx.State, applied: nnx.State) -> nnx.State:
    """The weights of a network with its style LoRAs added. The memory of `state` is reused."""
    return style.fused(graphdef, nnx.merge_state(state, applied))
