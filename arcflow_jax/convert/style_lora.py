"""Style LoRAs as trainers save them: which of our linear layers they change, and how.

    diffusers, PEFT   transformer.transformer_blocks.0.attn.to_q.lora_A.weight; or base_model.model.…
    kohya             lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, ….alpha; lora_te1_…, lora_te3_…
    XLabs             double_blocks.0.processor.qkv_lora1.down.weight
    ai-toolkit        transformer.… or diffusion_model.…, with diffusers' names or those of the model's authors

A name is the prefix of a component, the name of a linear layer as one of the component's tables has it, and what the
tensor is to it. kohya writes `_` for `.`. Nothing is left out: a tensor that is no part of a LoRA on a layer of the
model is an error.
"""

# r LoRA rank

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from arcflow_jax.convert.engine import DTYPES, Fill, Tensor, cast, fills
from arcflow_jax.convert.rules import TRANSPOSED, canonical, pattern
from arcflow_jax.errors import UserError, first_few
from arcflow_jax.schema import Scale

# What a name begins with, and the component that it is of; the last fits all names
PREFIXES = {
    "base_model.model.": "transformer",
    "model.diffusion_model.": "transformer",
    "diffusion_model.": "transformer",
    "transformer.": "transformer",
    "lora_unet_": "transformer",
    "lora_transformer_": "transformer",
    "text_encoder.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te_": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_2",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_2",
    "": "transformer",
}
PART = re.compile(
    r"(?P<layer>.+?)\.(?:(?:(?P<a>lora_A|lora_down|lora\.down|lora_linear_layer\.down|down)"
    r"|(?P<b>lora_B|lora_up|lora\.up|lora_linear_layer\.up|up))(?:\.default)?\.weight|(?P<alpha>alpha))"
)
# Other kinds of adapters, by what their names contain
OTHERS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa"}


class Update(NamedTuple):
    """The change a @ b · scale of the kernel [d_in, d_out] of a linear layer.

    Attributes:
      component, layer: which; the layer by its dotted path.
      index: of a stacked layer, which of the stack; None of others.
      a, b: [d_in, r] and [r, d_out], in the file's precision.
      scale: alpha / r.
    """

    component: str
    layer: str
    index: int | None
    a: np.ndarray
    b: np.ndarray
    scale: float


class Part(NamedTuple):
    """A layer of ours that a layer of a table is or contains: the target, and which of its stack."""

    fill: Fill
    index: int | None


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """PEFT's config of a LoRA, in adapter_config.json or in a file's metadata.

    Attributes:
      alpha_pattern: alphas of single layers, by regular expressions that match the end of the layer's name.
      use_rslora: the update is scaled by alpha / √r.
    """

    lora_alpha: Scale | None = None
    alpha_pattern: dict[str, Scale] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self):
        for text in self.alpha_pattern:
            try:
                re.compile(text)
            except re.error as error:
                raise UserError(f"alpha_pattern has {text!r}, which is no regular expression: {error}") from None
            if re.search(r"\)[*+?{]", text):  # it could take years to match
                raise UserError(f"alpha_pattern has {text[:100]!r}, which repeats a group: name the layers")

    def scale(self, layer: str, rank: int) -> float:
        """By which the update of a layer is multiplied; 1 if no alpha is known."""
        own = [alpha for text, alpha in self.alpha_pattern.items() if re.match(rf"(.*\.)?({text})$", layer)]
        alpha = own[0] if own else self.lora_alpha
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.use_rslora else rank)


class Names:
    """The linear layers of a component by their names in all layouts.

    Args:
      tables: of the layouts of its checkpoints and LoRAs.
      kernels: the shapes of its kernels by dotted path, [L, d_in, d_out] or [d_in, d_out].
    """

    def __init__(self, tables: Sequence[Any], kernels: Mapping[str, tuple[int, ...]]):
        self.tables: list[tuple[Any, dict[str, list[Part]]]] = []
        for table in tables:
            targets = [pattern(rule.target) for rule in table.RULES]
            own = {path: shape for path, shape in kernels.items() if any(regex.fullmatch(path) for regex in targets)}
            layers = collections.defaultdict(list)
            for fill in fills(table, own):
                for index, name in enumerate(fill.names):
                    layers[name.removesuffix(".weight")].append(Part(fill, index if fill.stacked else None))
            self.tables.append((table, dict(layers)))
        self.flat = {name.replace(".", "_"): name for _, layers in self.tables for name in layers}

    def find(self, name: str) -> str | None:
        """The name in a table of a layer that a file calls so; None if there is none."""
        for table, layers in self.tables:
            if (found := canonical(table, name)) in layers:
                return found
        return self.flat.get(name)

    def parts(self, name: str) -> list[Part]:
        """What a layer of a table is here."""
        return next(layers[name] for _, layers in self.tables if name in layers)


def read_lora(
    tensors: Mapping[str, Tensor], components: Mapping[str, Names], configs: Mapping[str, PeftConfig], where: str
) -> list[Update]:
    """The updates of a style LoRA.

    Args:
      tensors: name → array, which may be lazy.
      components: the layers that there are, by component; at least of those in `mentioned`.
      configs: PEFT's config of a component, if the file has one. Alphas among the tensors come first.
      where: the file, for errors.

    Raises:
      UserError: if it is another kind of adapter, or one line that lists all that is unknown, missing or wrong.
    """
    for mark, kind in OTHERS.items():
        if marked := [name for name in tensors if mark in name]:
            raise other_kind(where, kind, f"it has {len(marked)} tensors such as {marked[0]}")
    for component, config in configs.items():
        if config.use_dora:
            raise other_kind(where, "DoRA", f"its config has use_dora for {component}")
    pairs: dict[tuple[str, str], dict[str, str]] = collections.defaultdict(dict)  # layer -> "a", "b", "alpha" -> name
    unknown, wrong, missing = [], [], []
    for name in tensors:
        found = locate(name, components)
        if found is None:
            unknown.append(name)
        elif (first := pairs[found[0]].setdefault(found[1], name)) != name:
            wrong.append(f"{first} and {name} are two names of one tensor")
    for parts in pairs.values():
        missing += [f"{kind.upper()} beside {next(iter(parts.values()))}" for kind in "ab" if kind not in parts]
    for (component, layer), parts in pairs.items():
        wrong += misfits(tensors, parts, components[component].parts(layer))
    if not pairs and not unknown:
        raise UserError(f"{where} holds no LoRA: it has no tensors")
    findings = {"unknown": unknown, "missing": missing, "wrong": wrong}
    if any(findings.values()):
        raise UserError(
            f"{where} does not fit the model: "
            + "; ".join(f"{len(items)} {kind} ({first_few(items)})" for kind, items in findings.items() if items)
        )
    updates = []
    for (component, layer), parts in pairs.items():
        a, b = (cast(np.asarray(tensors[parts[x]]), tensors[parts[x]].dtype, f"{where}: {parts[x]}") for x in "ab")
        if "alpha" in parts:
            alpha = cast(np.asarray(tensors[parts["alpha"]]), np.float32, f"{where}: {parts['alpha']}")
            scale = alpha.item() / len(a)
        else:
            scale = configs.get(component, PeftConfig()).scale(layer, len(a))
        for fill, index in components[component].parts(layer):
            form_a, form_b = fill.form.lora or (TRANSPOSED, fill.form)
            ours = form_a.to_ours(a), form_b.to_ours(b if fill.rows is None else b[fill.rows])
            updates.append(Update(component, fill.target.removesuffix(".kernel"), index, *ours, scale))
    return updates


def mentioned(names: Iterable[str]) -> set[str]:
    """The components that a file's tensors are of."""
    return {PREFIXES[prefix_of(name)] for name in names}


def prefix_of(name: str) -> str:
    """The first of `PREFIXES` with which a name begins."""
    return next(prefix for prefix in PREFIXES if name.startswith(prefix))


def other_kind(where: str, kind: str, why: str) -> UserError:
    """The error of a file that holds another kind of adapter."""
    return UserError(
        f"{where} is a {kind}, not a LoRA: {why}; only LoRA can be applied, so merge it into the model first"
    )


def locate(name: str, components: Mapping[str, Names]) -> tuple[tuple[str, str], str] | None:
    """Component and layer of a tensor, and whether it is "a", "b" or "alpha"; None if it is none of them."""
    match = PART.fullmatch(name)
    if match is None:
        return None
    kind = next(kind for kind in ("a", "b", "alpha") if match[kind])
    prefix = prefix_of(name)
    component = PREFIXES[prefix]
    if component not in components:
        return None
    layer = components[component].find(match["layer"].removeprefix(prefix))
    return None if layer is None else ((component, layer), kind)


def misfits(tensors: Mapping[str, Tensor], parts: Mapping[str, str], layers: Sequence[Part]) -> list[str]:
    """What is wrong with the shapes and dtypes of a layer's LoRA."""
    wrong = [f"{name} is {tensors[name].dtype}" for name in parts.values() if tensors[name].dtype not in DTYPES]
    shapes = {kind: tuple(tensors[name].shape) for kind, name in parts.items()}
    d_out, d_in = layers[0].fill.source_shape
    (rank,) = shapes.get("a", ())[:1] or shapes.get("b", ())[-1:] or (1,)
    wanted = {"a": (rank, d_in), "b": (d_out, rank)}
    for kind, shape in wanted.items():
        if kind in shapes and shapes[kind] != shape:
            wrong.append(f"{parts[kind]} is {list(shapes[kind])} instead of [{shape[0]}, {shape[1]}]")
    if rank == 0:
        wrong.append(f"{parts.get('a') or parts['b']} has rank 0")
    if math.prod(shapes.get("alpha", ())) != 1:
        wrong.append(f"{parts['alpha']} is {list(shapes['alpha'])} instead of one number")
    return wrong
