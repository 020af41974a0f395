"""What the images of a batch share, and for which of these settings a server compiles programs before it is ready."""

# H, W size in pixels

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from arcflow_jax.image_to_image import STRENGTH
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.schema import NFE, Guidance, Offset, Pixels, Strength


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the images of a batch share.

    Attributes:
      guidance: None: the model's default.
      strength: of what starts from an image; None: from noise.
      masked: whether a mask says what of the image is made anew.
      references: how many reference images there are, which have the size of the image made.
      loras: names and strengths of style LoRAs; None: those of the start.
    """

    width: Pixels
    height: Pixels
    steps: NFE
    guidance: Guidance | None = None
    negative_prompt: str | None = None
    strength: Strength | None = None
    masked: bool = False
    references: int = 0
    loras: tuple[tuple[str, Offset], ...] | None = None

    def arguments(self) -> dict[str, int | float | str | None]:
        """The same, as `ArcFlowPipeline` takes them."""
        return {
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "negative_prompt": self.negative_prompt,
            "strength": self.strength,
        }

    @property
    def program(self) -> tuple[int, int, int, bool, bool, bool, int]:
        """What a program is compiled for."""
        kind = self.negative_prompt is not None, self.strength is not None, self.masked, self.references
        return self.width, self.height, self.steps, *kind


def declared(
    pipe: ArcFlowPipeline, sizes: Sequence[tuple[int, int]], steps: Sequence[int], edits: bool = False
) -> list[Settings]:
    """The settings of each (width, height) with each NFE; of a teacher, also with a negative prompt; with `edits`, also
    from an image, without and with a mask, and with each number of reference images that the model reads.

    Without sizes, the model's own; without steps, the pipeline's default. Raises UserError if they do not fit.
    """
    own = [pipe.described(width=width, height=height) for width, height in sizes] or [pipe.described()]
    negatives = [None] if pipe.student is not None else [None, ""]
    starts = [(None, False, 0)]
    if edits:
        numbers = range(1, most_references(pipe) + 1)
        starts += [(STRENGTH, False, 0), (STRENGTH, True, 0), *((None, False, number) for number in numbers)]
    return [
        Settings(
            int(each["width"]),
            int(each["height"]),
            count,
            None,
            negative_prompt=negative,
            strength=strength,
            masked=mask,
            references=references,
        )
        for strength, mask, references in starts
        for each in own
        for count in steps or [int(each["steps"])]
        for negative in negatives
    ]


def most_references(pipe: ArcFlowPipeline) -> int:
    """How many reference images a model reads at most."""
    rules = pipe.directory.family.references
    return 0 if rules is None else rules.most


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """An image to start from, or reference images.

    Attributes:
      pixels: [H, W, 3], uint8; of several reference images [n, H, W, 3].
      repaint: [H, W], bool, which pixels are made anew; None: all of them.
    """

    pixels: np.ndarray
    repaint: np.ndarray | None
