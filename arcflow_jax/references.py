"""Reference images: what some models read beside the prompts, for example to edit an image."""

# B images of a batch, I sets of reference images, H, W size in pixels, R tokens of a set, C latent channels

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from arcflow_jax.data.images import in_rgb
from arcflow_jax.errors import UserError
from arcflow_jax.families.family import ReferenceImages
from arcflow_jax.families.latents import token_grid, token_side
from arcflow_jax.image_to_image import GivenImages, ImageEncoder, as_pixels, size
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.conditioning import References
from arcflow_jax.parallel.mesh import partition_spec


@dataclasses.dataclass(frozen=True)
class ReferenceSets:
    """The reference images of a call.

    Attributes:
      pixels: for each place in a set, the images of all sets at that place, [I, H, W, 3], uint8. There is one set for
        each prompt, or one for all prompts.
      images_per_prompt: how many images are made of each prompt.
    """

    pixels: Sequence[np.ndarray]
    images_per_prompt: int

    def of(self, array: np.ndarray, made: np.ndarray) -> np.ndarray:
        """The rows of an array [I, ...] for the images to be made that have these numbers."""
        return array[np.zeros_like(made) if len(array) == 1 else made // self.images_per_prompt]


def reads_references(directory: ModelDirectory, mask_image: object, settings: Mapping[str, Any]) -> bool:
    """Whether the images of a call are reference images: if the model reads them, and the call has neither a mask nor a
    strength, which are for an image to start from."""
    return directory.family.references is not None and mask_image is None and settings.get("strength") is None


def reference_sets(
    directory: ModelDirectory,
    image: GivenImages,
    prompts: int,
    images_per_prompt: int,
    settings: Mapping[str, Any],
) -> tuple[ReferenceSets, dict[str, Any]]:
    """The reference images of a call, in the sizes that are encoded, and the settings that follow from them.

    By default, the images made have the size of the first one.

    Args:
      directory: of a model that reads reference images.
      image: one, or a list of them for all prompts, or a list of such lists, one for each prompt: PIL images, or arrays
        [H, W, 3], uint8 or floating-point numbers between 0 and 1.
      prompts: their number.
      images_per_prompt: how many images are made of each.
      settings: of the call.

    Raises:
      UserError: if the images cannot be used, or do not fit one another.
    """
    rules, side = rules_of(directory), token_side(directory.config("vae").factor)
    given: Any = list(image) if is_list(image) or getattr(image, "ndim", 0) == 4 else [image]
    sets = given if given and all(map(is_list, given)) else [given]
    if len(sets) not in (1, prompts):
        raise UserError(f"image has {len(sets)} lists of reference images, but {prompts} prompts: give one list each")
    for each in sets:
        if not 1 <= len(each) <= rules.most:
            count = "1" if rules.most == 1 else f"1 to {rules.most}"
            raise UserError(f"image has {len(each)} reference images, but has to have {count}")
    fitted = [[fit(rules, each, side) for each in images] for images in sets]
    sizes = {tuple(size(pixels) for pixels in images): None for images in fitted}
    if len(sizes) > 1:
        first, other = (" and ".join(each) for each in list(sizes)[:2])
        raise UserError(f"reference images are of {first} for one prompt, of {other} for another: give one size a call")
    height, width = fitted[0][0].shape[:2]
    follows = {name: each for name, each in (("height", height), ("width", width)) if settings.get(name) is None}
    return ReferenceSets([np.stack(place) for place in zip(*fitted, strict=True)], images_per_prompt), follows


def is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def rules_of(directory: ModelDirectory) -> ReferenceImages:
    """Raises UserError if the model reads no reference images."""
    if (rules := directory.family.references) is None:
        raise UserError(f"{directory.path} is a {directory.family.pipeline}, which reads no reference images")
    return rules


def fit(rules: ReferenceImages, image: Image.Image | np.ndarray, side: int) -> np.ndarray:  # [H, W, 3], uint8
    """A reference image as it is encoded. Raises UserError if it cannot be used."""
    rgb = in_rgb(image) if isinstance(image, Image.Image) else Image.fromarray(as_pixels("image", image))
    return np.asarray(rules.fitted(rgb, side))


class ReferenceTokens:
    """The latents of a call's reference images.

    Args:
      directory: the converted model.
      sets: the images.
      encoder: of the model's VAE.
      mesh: that the batches are split over.
    """

    def __init__(self, directory: ModelDirectory, sets: ReferenceSets, encoder: ImageEncoder, mesh: Mesh):
        factor = directory.config("vae").factor
        grids = [token_grid(*pixels.shape[1:3], factor) for pixels in sets.pixels]
        self.positions = rules_of(directory).positions(grids)
        self.tokens = np.concatenate([encoder(pixels) for pixels in sets.pixels], axis=1)  # [I, R, 4C]
        self.sets, self.mesh = sets, mesh

    def __call__(self, made: np.ndarray) -> References:
        """The references of a batch: of the images to be made that have these numbers."""
        tokens = self.sets.of(self.tokens, made)
        spec = partition_spec(self.mesh, ("batch", "tokens", None), tokens.shape)
        return References(jax.device_put(tokens, NamedSharding(self.mesh, spec)), self.positions)
