"""Images to be judged, in a fixed order: those of a folder, or straight from a sampler."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from arcflow_jax.data.images import SUFFIXES, read_image, read_images
from arcflow_jax.data.prompts import Prompts, hidden
from arcflow_jax.errors import UserError
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.storage.files import digest


class ImageSet(Protocol):
    """Images, each with the prompt that it should show.

    Attributes:
      count: number of images.
      identity: tells this set from others: `count`, and where the images come from; JSON.
      together: how many images are made at a time.
    """

    count: int
    identity: dict[str, Any]
    together: int

    def stream(self, first: int, end: int | None = None) -> Iterator[Image.Image]:
        """The images from number `first` up to `end`, in RGB. Raises UserError if one cannot be read or made."""

    def prompt(self, image: Image.Image) -> str:
        """The prompt of an image that `stream` yielded. Raises UserError if it is not known."""


class Folder:
    """The images in a folder and its subfolders, ordered by path.

    Prompts come from the text `prompt` in each PNG, as `arcflow sample` and `arcflow evaluate export` write it, or
    from captions in the layout that training with images reads (see `data.images`).

    Raises:
      UserError: if there are none.
    """

    together = 1

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"image folder {folder} does not exist")
        self.folder = folder
        self.files = [
            file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES and not hidden(file, folder)
        ]
        self.count = len(self.files)
        if not self.files:
            raise UserError(f"{folder} contains no images: it needs {', '.join(SUFFIXES)} files")
        states = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        self.identity = {"folder": str(folder), "count": self.count, "files_sha256": digest(states)}

    def stream(self, first: int, end: int | None = None) -> Iterator[Image.Image]:
        for file in self.files[first:end]:
            image = read_image(file)
            image.info["file"] = file
            yield image

    def prompt(self, image: Image.Image) -> str:
        return image.info.get("prompt") or self._captions[image.info["file"]]

    @functools.cached_property
    def _captions(self) -> dict[Path, str]:
        return {image.files[0]: image.caption for image in read_images(self.folder)}


class Sampled:
    """One image per prompt, made on demand and not kept.

    Args:
      pipeline: makes the images.
      prompts: image i shows prompt i and starts from the seed's noise number i.
      batch_size: images per call of the sampler; does not change the images.
      settings: keyword arguments of `ArcFlowPipeline.settings`.
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
        self.together = pipeline.together(batch_size)
        self.identity = {
            "prompts": prompts.source,
            "count": self.count,
            "prompts_sha256": digest(prompts.texts),
            **pipeline.described(**settings),
        }

    def stream(self, first: int, end: int | None = None) -> Iterator[Image.Image]:
        prompts = self.prompts[first:end]
        yield from self.pipeline.stream(prompts, first=first, batch_size=self.batch_size, **self.settings)

    def prompt(self, image: Image.Image) -> str:
        return image.info["prompt"]
