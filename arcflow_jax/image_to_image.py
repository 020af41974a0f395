"""Images to start from: their checks, their latents, and what of them an inpainting keeps."""

# B images of a batch, I given images, H, W size in pixels, h, w of the latent image, N tokens, C latent channels,
# f pixels per latent pixel and axis

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from arcflow_jax.data.images import in_rgb
from arcflow_jax.errors import UserError
from arcflow_jax.families.latents import PATCH, pack
from arcflow_jax.flow.sampler import Known, noised
from arcflow_jax.flow.schedule import euler_level
from arcflow_jax.generate import teacher_grid
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.parallel.offload import Offload, Weights, running_shardings

STRENGTH = 0.6  # the default, as in diffusers
LUMA = np.array([0.299, 0.587, 0.114])  # gray from RGB (ITU-R 601), as Pillow computes it
# What a caller may give: one image or several, PIL images or arrays as they come from `output_type="np"`; of reference
# images also several for each prompt
OneImage = Image.Image | np.ndarray
GivenImages = OneImage | Sequence[OneImage | Sequence[OneImage]]


@dataclasses.dataclass(frozen=True)
class Given:
    """The images that a call starts from.

    Attributes:
      pixels: [I, H, W, 3], uint8; one image for each prompt, or one for all.
      repaint: [I, H, W], which pixels are made anew, likewise; None for all of them.
      images_per_prompt: how many images are made of each prompt.
    """

    pixels: np.ndarray
    repaint: np.ndarray | None
    images_per_prompt: int = 1

    @property
    def height(self) -> int:
        return self.pixels.shape[1]

    @property
    def width(self) -> int:
        return self.pixels.shape[2]

    def of(self, array: np.ndarray, made: np.ndarray) -> np.ndarray:
        """The rows of an array [I, ...] that belong to the images with these numbers among those to be made."""
        return array[np.zeros_like(made) if len(array) == 1 else made // self.images_per_prompt]

    def composite(self, i: int, made: np.ndarray) -> np.ndarray:  # [H, W, 3], uint8
        """Image i as it was made, with the given pixels wherever it was not to be repainted."""
        if self.repaint is None:
            return made
        number = np.array([i])
        return np.where(self.of(self.repaint, number)[0, ..., None], made, self.of(self.pixels, number)[0])


def given_images(
    image: GivenImages | None,
    mask_image: GivenImages | None,
    prompts: int,
    images_per_prompt: int,
    settings: Mapping[str, Any],
) -> tuple[Given | None, dict[str, Any]]:
    """The images that a call starts from, None if it starts from noise; and the settings that follow from them.

    Args:
      image: one, or one for each prompt, of one size: PIL images, or arrays [H, W, 3] or [I, H, W, 3], uint8 or
        floating-point numbers between 0 and 1.
      mask_image: the same for the masks, which may be [H, W]; white (from half on) is repainted.
      prompts: their number.
      images_per_prompt: how many images are made of each.
      settings: of the call.

    Raises:
      UserError: if they do not fit one another.
    """
    if image is None:
        for name, value in (("mask_image", mask_image), ("strength", settings.get("strength"))):
            if value is not None:
                raise UserError(f"{name} is for an image to start from: give image as well, or leave {name} out")
        return None, {}
    pixels, masks = stacked("image", image, prompts), None
    given = Given(pixels, None, images_per_prompt)
    follows = {"height": given.height, "width": given.width}
    for name, side in follows.items():
        if settings.get(name) not in (None, side):
            raise UserError(f"{name} is {settings[name]}, but image has {side}: resize it, or leave {name} out")
    if settings.get("strength") is None:
        follows["strength"] = STRENGTH
    if mask_image is not None:
        masks = stacked("mask_image", mask_image, prompts)
        if masks.shape[1:3] != pixels.shape[1:3]:
            raise UserError(f"mask_image is {size(masks[0])}, but has to have the size of image, {size(pixels[0])}")
        given = dataclasses.replace(given, repaint=masks @ LUMA >= 127.5)
    return given, follows


def stacked(name: str, images: GivenImages, prompts: int) -> np.ndarray:  # [I, H, W, 3], uint8
    """One image or several. Raises UserError if they differ in size, or are neither one nor one for each prompt."""
    several = isinstance(images, Sequence) or getattr(images, "ndim", 0) == 4
    arrays = [as_pixels(name, each) for each in (images if several else [images])]
    if len(arrays) not in (1, prompts):
        hint = "; reference images are for models that read them, without strength" if name == "image" else ""
        found = f"{name} has {len(arrays)} images, but has to have one, or one for each prompt, {prompts}"
        raise UserError(found + hint)
    if others := [array for array in arrays if array.shape != arrays[0].shape]:
        raise UserError(f"{name} has images of {size(arrays[0])} and {size(others[0])}: give one size in a call")
    return np.stack(arrays)


def as_pixels(name: str, image: Image.Image | np.ndarray) -> np.ndarray:  # [H, W, 3], uint8
    """An image in RGB, a mask in gray levels. Raises UserError if it is none."""
    if isinstance(image, Image.Image):
        return np.asarray(in_rgb(image))
    mask, shape = name == "mask_image", list(getattr(image, "shape", ()))
    if len(shape) not in ((2, 3) if mask else (3,)) or shape[2:] not in ([], [3]) or 0 in shape:
        what = f"{type(image).__name__} {shape or ''}".strip()
        raise UserError(f"{name} is {what}, but has to be a PIL image or an array [H, W{'] or [H, W' * mask}, 3]")
    array = np.asarray(image)
    array = array if len(shape) == 3 else np.repeat(array[..., None], 3, -1)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # NaN compares false
            raise UserError(f"{name} has numbers outside of 0 to 1, where its floating-point numbers have to lie")
        return np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UserError(f"{name} is of {array.dtype}, but has to be of uint8, or floating-point numbers from 0 to 1")
    return array


def size(pixels: np.ndarray) -> str:
    """Height and width of an array [H, W, 3], as they stand in an error message."""
    return f"{pixels.shape[0]}x{pixels.shape[1]}"


@functools.partial(jax.jit, static_argnames="graphdef")
def encode_image(graphdef: nnx.GraphDef, encoder: nnx.State, pixels: jax.Array) -> jax.Array:
    """Latent tokens [1, N, 4C], float32, of pixels [1, H, W, 3], uint8: the mean of the VAE's posterior."""
    dtype = jax.tree.leaves(encoder)[0].dtype
    vae = nnx.merge(graphdef, encoder)
    return pack(vae.encode((pixels / 127.5 - 1).astype(dtype))).astype(jnp.float32)


class ImageEncoder:
    """The VAE's encoder with its weights, which are loaded here: only what starts from images needs them."""

    def __init__(self, directory: ModelDirectory, dtype: Any, mesh: Mesh, offload: Offload | None):
        vae: Any = directory.abstract("vae", dtype)
        self.graphdef, abstract = nnx.split(vae.encoder_alone())
        state = directory.load("vae", abstract, running_shardings(mesh, abstract, offload), vae.ENCODER)
        self.weights = Weights(state, offload is not None)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Latent tokens [I, N, 4C], float32, of pixels [I, H, W, 3], uint8, one image after another."""
        each = np.split(pixels, len(pixels))
        return np.concatenate(self.weights.run(lambda state: [encode_image(self.graphdef, state, x) for x in each]))


class Beginning:
    """Where the batches of a call start: from its images with noise.

    Args:
      directory: the converted model.
      given: the images.
      encoder: of the model's VAE.
      strength: see `start_level`.
      teacher_steps: likewise.
    """

    def __init__(
        self, directory: ModelDirectory, given: Given, encoder: ImageEncoder, strength: float, teacher_steps: int
    ):
        self.given, self.clean, self.repaint = given, encoder(given.pixels), None
        tokens, features = self.clean.shape[1:]
        self.start = start_level(directory, tokens, strength, teacher_steps)
        if given.repaint is not None:
            self.repaint = mask_tokens(given.repaint, directory.config("vae").factor, features)

    def __call__(self, noise: jax.Array, made: np.ndarray) -> tuple[jax.Array, jax.Array, Known | None]:
        """Latents [B, N, 4C] of the images with these numbers, their σ, and what of them is known."""
        clean = jnp.asarray(self.given.of(self.clean, made))
        known = None
        if self.repaint is not None:
            known = Known(clean, noise, jnp.asarray(self.given.of(self.repaint, made)))
        return jax.jit(noised)(clean, noise, self.start), self.start, known


def mask_tokens(repaint: np.ndarray, factor: int, features: int) -> np.ndarray:  # [I, H, W] -> [I, N, 4C]
    """Which latents are sampled: those of latent pixels in which any pixel is repainted."""
    count, height, width = repaint.shape
    latent = repaint.reshape(count, height // factor, factor, width // factor, factor).any((2, 4))
    channels = np.broadcast_to(latent[..., None], (*latent.shape, features // PATCH**2))
    return np.asarray(pack(jnp.asarray(channels)))


def start_level(directory: ModelDirectory, tokens: int, strength: float, teacher_steps: int) -> jax.Array:
    """σ at which a strength starts: where the schedule of a model's scheduler is at timestep t = strength.

    It is the same for the student, so that it starts from the noise level of the teacher, whatever its own timestep
    shift.

    Args:
      tokens: N.
      teacher_steps: the Euler steps of that schedule.
    """
    return jax.jit(euler_level, static_argnums=1)(
        strength, teacher_steps, *teacher_grid(directory, tokens, teacher_steps)
    )
