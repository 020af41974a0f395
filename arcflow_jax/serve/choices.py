"""What the page lets a user choose, and the same read back from a PNG. Knows no Gradio."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from arcflow_jax.data.images import BROKEN
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.families.family import takes_guidance
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.serve.engine import Engine
from arcflow_jax.serve.requests import Generation, Limits
from arcflow_jax.serve.settings import Settings, Start, declared
from arcflow_jax.serve.start_image import References, StartImage

SEED = 2**53 - 1  # the largest that a browser's numbers have exactly
GUIDANCE = 10.0
WEAKEST, STRONGEST = -1.0, 2.0  # strengths of a style LoRA
# What a user cannot choose
FIXED = ("model", "adapter", "final_step_ratio", "negative_prompt", "norm_preserving")


def comparison(teacher: ArcFlowPipeline, sizes: Sequence[tuple[int, int]], edits: bool) -> list[Settings]:
    """The settings that the page compares a teacher in, so that no other program is compiled. Raises UserError."""
    negative = negative_prompt(teacher)
    settings = declared(teacher, sizes, [], edits)
    return [each for each in settings if each.negative_prompt == negative]


def negative_prompt(teacher: ArcFlowPipeline) -> str | None:
    """Of a comparison: without a guidance embedding a teacher needs classifier-free guidance."""
    return None if takes_guidance(teacher.directory.config("transformer")) else ""


@dataclasses.dataclass(frozen=True)
class Offer:
    """What there is to choose from.

    Attributes:
      guidance: default and largest guidance scale; None if the model takes none.
      loras: strengths of the style LoRAs at the start.
      edits: whether there may be an image to start from.
      references: how many reference images there may be.
      fixed: what all images have in their `info`.
    """

    sizes: tuple[str, ...]
    steps: tuple[int, ...]
    guidance: tuple[float, float] | None
    loras: dict[str, float]
    edits: bool
    references: int
    fixed: dict[str, str]

    @classmethod
    def of(cls, engine: Engine) -> Offer:
        """What an engine has compiled."""
        pipe, default = engine.pipeline, engine.declared[0]
        described = pipe.described(**default.arguments())
        own = float(described["guidance"])
        return cls(
            sizes=tuple(dict.fromkeys(f"{each.width}x{each.height}" for each in engine.declared)),
            steps=tuple(sorted({each.steps for each in engine.declared})),
            guidance=(own, max(own, GUIDANCE)) if takes_guidance(pipe.directory.config("transformer")) else None,
            loras=engine.loras,
            edits=any(each.strength is not None for each in engine.declared),
            references=max(each.references for each in engine.declared),
            fixed={name: fixed(name, described) for name in FIXED},
        )

    def strengths(self, name: str) -> tuple[float, float]:
        """Smallest and largest strength of a style LoRA."""
        return min(WEAKEST, self.loras[name]), max(STRONGEST, self.loras[name])


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a user has chosen.

    Attributes:
      seed: None: 0.
      steps: None: the default of the model that makes the image.
      strength: of `start`.
      loras: strengths in the order of the offer.
    """

    prompt: str
    seed: int | None
    size: str
    steps: int | None
    guidance: float | None
    strength: float
    start: StartImage | None
    references: References | None
    loras: tuple[float, ...]

    def given(self) -> tuple[Start | None, float | None, int]:
        """An image to start from and its strength; or reference images and their number. Raises UserError for both."""
        if self.start is not None and self.references is not None:
            raise UserError("it starts from an image or reads reference images, but not both: remove one of them")
        if self.references is not None:
            return self.references.fitted[self.size], None, len(self.references)
        return (None, None, 0) if self.start is None else (self.start.start(self.size), self.strength, 0)

    def generation(self, offer: Offer, negative_prompt: str | None = None) -> Generation:
        """The request. Raises UserError."""
        loras = dict(zip(offer.loras, map(float, self.loras), strict=True))
        return Generation(
            prompt=self.prompt,
            negative_prompt=negative_prompt,
            seed=int(self.seed or 0),
            size=self.size,
            steps=self.steps,
            guidance=None if self.guidance is None or offer.guidance is None else float(self.guidance),
            # Without the field it shares batches with requests that have none
            loras=None if loras == offer.loras else {name: value for name, value in loras.items() if value},
        )


@dataclasses.dataclass
class Found:
    """The settings of a PNG; None for what it does not have, or what is not offered.

    Attributes:
      loras: strengths in the order of the offer.
      notes: what a user has to know, in whole sentences.
    """

    prompt: str
    seed: int | None
    size: str | None
    steps: int | None
    guidance: float | None
    strength: float | None
    loras: list[float]
    notes: list[str]


def read_back(file: str, offer: Offer, limits: Limits) -> Found:
    """The settings that the page, the API or `arcflow sample` has written into a PNG. Raises UserError."""
    try:
        with Image.open(file, formats=["PNG"]) as opened:
            info, size = dict(opened.info), f"{opened.width}x{opened.height}"
        prompt, seed, steps = str(info["prompt"]), int(info["seed"]), int(info["steps"])
        guidance, number = float(info.get("guidance", "nan")), int(info.get("image", 0))
        strength = float(info["strength"]) if "strength" in info else None
        loras = {lora_name(path): float(value) for path, value in pairs(info.get("loras", ""))}
    except (*BROKEN, KeyError):
        raise UserError("This file has no settings in it. Drop a PNG that was made here.") from None
    notes = []

    def offered(what: str, value: Any, fits: bool) -> Any:
        """The value if it is offered; otherwise a note."""
        if not fits:
            notes.append(f"Its {what} {value} is not offered here. The page keeps its own.")
        return value if fits else None

    most = offer.guidance[1] if offer.guidance else 0.0
    found = Found(
        prompt=prompt[: limits.prompt],
        seed=offered("seed", seed, 0 <= seed <= SEED),
        size=offered("size", size, size in offer.sizes),
        steps=offered("number of steps", steps, steps in offer.steps),
        guidance=offered("guidance", guidance, 0 <= guidance <= most)
        if offer.guidance and guidance == guidance
        else None,
        strength=offered("strength", strength, 0 < strength <= 1) if offer.edits and strength is not None else None,
        loras=[],
        notes=notes,
    )
    for lora, start in offer.loras.items():
        least, largest = offer.strengths(lora)
        value = loras.pop(lora, 0.0)
        fitting = offered(f"strength of the LoRA {lora},", value, least <= value <= largest)
        found.loras.append(start if fitting is None else fitting)
    notes += [f"Its LoRA {one_line(lora)} is not loaded here." for lora in loras]
    if number:
        notes.append(f"It is image {number} of its seed. The page makes image 0.")
    if strength is not None:
        what = "Choose that image again." if offer.edits else "The page starts from noise."
        notes.append(f"It started from an image. {what}")
    if "references" in info:
        what = "Choose those images again." if offer.references else "The page has none."
        notes.append(f"It had reference images. {what}")
    for key, ours in offer.fixed.items():
        if (theirs := fixed(key, info)) != ours:
            notes.append(f"Its {key.replace('_', ' ')}: {one_line(theirs) or 'none'}. Here: {ours or 'none'}.")
    return found


def fixed(name: str, info: Mapping[str, Any]) -> str:
    """What an image's `info` says; of weights the last part of the path."""
    text = str(info.get(name, ""))
    return Path(text).name if name in ("model", "adapter") else text


def pairs(loras: object) -> list[tuple[str, str]]:
    """Names and strengths of a text such as `grain:0.8, watercolour:1`."""
    return re.findall(r"(?:^|, )(.+?):([^:,]+)(?=, |$)", str(loras))


def lora_name(path: str) -> str:
    """What a server calls a LoRA of this path or hub id."""
    return Path(path).name.removesuffix(".safetensors")
