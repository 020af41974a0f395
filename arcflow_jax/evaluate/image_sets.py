"""Images to be judged, in a fixed order: those of a folder, or straight from a sampler."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from arcflow_jax import schema
from arcflow_jax.data.images import METADATA, SUFFIXES, read_image, read_images, text_in
from arcflow_jax.data.prompts import Prompts, hidden
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.schema import Batch
from arcflow_jax.storage.files import digest


class ImageSet(Protocol):
    """Images, each with the prompt that it should show.

    Attributes:
      count: number of images.
      identity: tells this set from others: `count`, and where the images come from; JSON.
      together: how many images are made at a time.
      prompts: the prompt of each image, in the images' order. Raises UserError if one is not known.
      images_per_prompt: how many images each prompt has, one after another. Raises UserError if they have not
        equally many.
    """

    count: int
    identity: dict[str, Any]
    together: int

    @property
    def prompts(self) -> Sequence[str]: ...

    @property
    def images_per_prompt(self) -> int: ...

    def stream(self, first: int, end: int | None = None) -> Iterator[Image.Image]:
        """The images from number `first` up to `end`, in RGB. Raises UserError if one cannot be read or made."""

    def prompt(self, image: Image.Image) -> str:
        """The prompt of an image that `stream` yielded. Raises UserError if it is not known."""


class Folder:
    """The images in a folder and its subfolders, ordered by path.

    Prompts come from the text `prompt` in each PNG, as `arcflow sample` and `arcflow evaluate export` write it, or
    from captions in the layout that training with images reads (see `data.images`).

    Args:
      by_prompt: the images of a prompt follow one another, ordered by path, in the place of the first of them.

    Raises:
      UserError: if there are none; with `by_prompt`, if a prompt is not known.
    """

    together = 1

    def __init__(self, folder: Path, by_prompt: bool = False):
        if not folder.is_dir():
            raise UserError(f"image folder {folder} does not exist")
        self.folder = folder
        self.files = [
            file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES and not hidden(file, folder)
        ]
        self.count = len(self.files)
        if not self.files:
            raise UserError(f"{folder} contains no images: it needs {', '.join(SUFFIXES)} files")
        if by_prompt:
            files = {prompt: [] for prompt in self.prompts}
            for file, prompt in zip(self.files, self.prompts, strict=True):
                files[prompt].append(file)
            self.files = [file for group in files.values() for file in group]
            self.prompts = [prompt for prompt, group in files.items() for _ in group]
        states = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        self.identity = {"folder": str(folder), "count": self.count, "files_sha256": digest(states)}

    def stream(self, first: int, end: int | None = None) -> Iterator[Image.Image]:
        for file in self.files[first:end]:
            image = read_image(file)
            image.info["file"] = file
            yield image

    def prompt(self, image: Image.Image) -> str:
        return image.info.get("prompt") or self._caption(image.info["file"])

    @functools.cached_property
    def prompts(self) -> list[str]:
        return [text_in(file, "prompt") or self._caption(file) for file in self.files]

    @functools.cached_property
    def images_per_prompt(self) -> int:
        counts = Counter(self.prompts)
        (most, many), (least, few) = counts.most_common(1)[0], counts.most_common()[-1]
        if few < many:
            raise UserError(
                f"{self.folder} has {many} images of {one_line(repr(most))}, but {few} of {one_line(repr(least))}: "
                "diversity needs equally many of each prompt"
            )
        if many < 2:
            raise UserError(f"{self.folder} has one image of each prompt: diversity needs at least two")
        return many

    def _caption(self, file: Path) -> str:
        """Raises UserError if there is none."""
        if (found := self._captions.get(file)) is None:
            raise UserError(f"{file} has no prompt, and {self.folder} no caption of it: name all images in {METADATA}")
        return found

    @functools.cached_property
    def _captions(self) -> dict[Path, str]:
        return {image.files[0]: image.caption for image in read_images(self.folder)}


class Sampled:
    """Images of prompts, made on demand and not kept. Image i starts from the seed's noise number i.

    Args:
      pipeline: makes the images.
      prompts: what they show.
      batch_size: images per call of the sampler; does not change the images.
      images_per_prompt: images of each prompt, one after another.
      settings: keyword arguments of `ArcFlowPipeline.settings`.
    """

    def __init__(
        self,
        pipeline: ArcFlowPipeline,
        prompts: Prompts,
        batch_size: int | None = None,
        images_per_prompt: int = 1,
        **settings: Any,
    ):
        self.pipeline, self.batch_size, self.settings = pipeline, batch_size, settings
        self.images_per_prompt = schema.converted(Batch, images_per_prompt, "images_per_prompt")
        self.prompts = [prompt for prompt in prompts.texts for _ in range(self.images_per_prompt)]
        self.count = len(self.prompts)
        self.together = pipeline.together(batch_size)
        self.identity = {
            "prompts": prompts.source,
            "count": self.count,
            "prompts_sha256": digest(prompts.texts),
            **pipeline.described(**settings),
        }
        if images_per_prompt > 1:
            self.identity["images_per_prompt"] = images_per_prompt

    def stream(self, first: int, end: int | None = None) -> Iterator[Image.Image]:
        prompts = self.prompts[first:end]
        yield from self.pipeline.stream(prompts, first=first, batch_size=self.batch_size, **self.settings)

    def prompt(self, image: Image.Image) -> str:
        return image.info["prompt"]
