"""The world of shapes: one coloured shape on a plain background, with captions.

An image is drawn from five attributes. Its caption always names shape, colour and position, and may omit size and
background. An omitted attribute takes any value, including values between the named ones, so a caption stands for a
continuous distribution of images. Most captions omit the background. It covers the most pixels, so it curves the
sampler's trajectories most, and a network of this size can still learn it.
"""

# B batch, P pixels along a side

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from arcflow_jax.demo import ASSETS, SIDE
from arcflow_jax.demo.captions import POSITION_WORDS, POSITIONS, Captions, within
from arcflow_jax.demo.world import World

# Each attribute's values; -1 in an attribute array means that the caption omits the attribute.
SHAPES = ("circle", "square", "triangle", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "gray", "black")
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": COLOURS,
    "position": POSITIONS,
    "size": SIZES,
    "background": BACKGROUNDS,
}

COLOUR_RGB = np.array([[225, 45, 45], [40, 165, 75], [45, 85, 225], [250, 210, 40], [160, 40, 210]]) / 255
# Lowest and highest value of each number that an image is drawn with; the last entry is for an omitted attribute.
CENTRE = np.array([[21, 32], [43, 32], [32, 21], [32, 43], [32, 32]], np.float32)  # x, y in pixels
CENTRE = np.stack([CENTRE - 2, CENTRE + 2], axis=1)  # [POSITIONS, 2, 2]
RADIUS = np.array([[10.0, 12.5], [16.0, 18.5], [10.0, 18.5]], np.float32)  # pixels
LIGHTNESS = np.array([[0.92, 1.0], [0.46, 0.54], [0.0, 0.08], [0.0, 1.0]], np.float32)  # of the background's gray

OMITTED = {"size": 0.1, "background": 0.8}  # probability that a caption omits the attribute


@dataclasses.dataclass(frozen=True)
class Caption:
    """What a caption asks for: the index of each attribute's value, -1 if it is omitted."""

    shape: int
    colour: int
    position: int
    size: int = -1
    background: int = -1

    def __str__(self) -> str:
        words = ["a"]
        if self.size >= 0:
            words.append(SIZES[self.size])
        words += [COLOURS[self.colour], SHAPES[self.shape], POSITION_WORDS[self.position]]
        if self.background >= 0:
            words.append(f"on a {BACKGROUNDS[self.background]} background")
        return " ".join(words)

    def as_array(self) -> np.ndarray:  # [5], in the order of ATTRIBUTES
        return np.array(dataclasses.astuple(self))


CAPTIONS = Captions(Caption, ATTRIBUTES, OMITTED)
WORLD = World(captions=CAPTIONS, folder=ASSETS / "shapes", judge_sizes={"widths": (16, 32, 64, 64), "features": 64})


def render(key: jax.Array, attributes: jax.Array) -> jax.Array:
    """Images [B, P, P, 3] in [-1, 1] for captions with attributes [B, 5]; `key` draws what the captions leave open.

    Antialiased: a pixel's coverage is its signed distance to the outline, clipped to half a pixel on both sides.
    """
    shape, colour, position, size, background = attributes.T

    keys = jax.random.split(key, 3)
    centre, radius = within(keys[0], CENTRE, position), within(keys[1], RADIUS, size)
    lightness = within(keys[2], LIGHTNESS, background)

    grid = jnp.arange(SIDE) + 0.5
    x = (grid[None, None, :] - centre[:, 0, None, None]) / radius[:, None, None]  # [B, 1, P], in radii
    y = (grid[None, :, None] - centre[:, 1, None, None]) / radius[:, None, None]  # [B, P, 1]
    from_centre = jnp.hypot(x, y)
    circle = from_centre - 1.0
    square = jnp.maximum(jnp.abs(x), jnp.abs(y)) - 0.87
    triangle = jnp.maximum(y - 0.75, 0.5 * (3**0.5 * jnp.abs(x) - y) - 0.52)
    ring = jnp.abs(from_centre - 0.76) - 0.24
    distance = jnp.stack([circle, square + 0 * circle, triangle + 0 * circle, ring])  # [4, B, P, P]
    distance = jnp.take_along_axis(distance, shape[None, :, None, None], axis=0)[0] * radius[:, None, None]
    coverage = jnp.clip(0.5 - distance, 0.0, 1.0)[..., None]

    front = jnp.asarray(COLOUR_RGB, jnp.float32)[colour][:, None, None]
    back = lightness[:, None, None, None]
    return (coverage * front + (1 - coverage) * back) * 2 - 1
