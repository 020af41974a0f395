"""Pictures to be judged, in a fixed order: those of a folder, or straight from a sampler."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from arcflow_jax.data.images import SUFFIXES, read_images
from arcflow_jax.data.prompts import Prompts, hidden
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.storage.files import digest


class PictureSet(Protocol):
    """Pictures, each with what it should show.

    Attributes:
      count: how many.
      of: what identifies them, as JSON takes it.
    """

    count: int
    of: dict[str, Any]

    def stream(self, first: int) -> Iterator[Image.Image]:
        """Those from number `first` on, in RGB. Raises UserError if one cannot be read or made."""

    def prompt(self, image: Image.Image) -> str:
        """What one that was streamed should show. Raises UserError if that is not known."""


class Folder:
    """The pictures in a folder and the folders in it, by path.

    What they should show is the text `prompt` in each PNG, as arcflow sample and export write it, or captions as
    training with pictures reads them (see `pictures.read_images`).

    Raises:
      UserError: if there are none.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"folder of pictures {folder} does not exist")
        self.folder = folder
        self.files = [
            file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES and not hidden(file, folder)
        ]
        self.count = len(self.files)
        if not self.files:
            raise UserError(f"{folder} holds no pictures: it has to have files {', '.join(SUFFIXES)}")
        states = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        self.of = {"folder": str(folder), "pictures": self.count, "files_sha256": digest(states)}

    def stream(self, first: int) -> Iterator[Image.Image]:
        for file in self.files[first:]:
            try:
                with Image.open(file) as image:
                    picture = image.convert("RGB")
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise UserError(f"cannot read picture {file}: {one_line(error)}") from None
            picture.info["file"] = file
            yield picture

    def prompt(self, image: Image.Image) -> str:
        return image.info.get("prompt") or self._captions[image.info["file"]]

    @functools.cached_property
    def _captions(self) -> dict[Path, str]:
        return {picture.file: picture.caption for picture in read_images(self.folder)}


class Sampled:
    """Pictures of prompts, made as they are asked for and not kept.

    Args:
      pipeline: makes them.
      prompts: one picture each; the noise of the i-th is the seed's i-th.
      batch_size: pictures made at a time, which changes nothing about them.
      settings: of `ArcFlowPipeline.settings`.
    """

    def __init__(
        self,
        pipeline: ArcFlowPipeline,
        prompts: Prompts,
        batch_size: int | None = None,
        **settings: Any,
    ):
        self.pipeline, self.prompts, self.batch_size, self.settings = pipeline, prompts.texts, batch_size, settings
        self.count = len(prompts.texts)
        self.of = {
            "prompts": prompts.source,
            "pictures": self.count,
            "prompts_sha256": digest(prompts.texts),
            **pipeline.described(**settings),
        }

    def stream(self, first: int) -> Iterator[Image.Image]:
        prompts = self.prompts[first:]
        yield from self.pipeline.stream(prompts, first=first, batch_size=self.batch_size, **self.settings)

    def prompt(self, image: Image.Image) -> str:
        return image.info["prompt"]
