"""The world of emoji: one of Noto's emoji over a plain background, with captions.

An image is drawn from four attributes. Its caption always names the emoji, and may omit size, position and background.
An omitted size or position takes any value, the position also a corner; an omitted background is any mixture of two. So
a caption stands for a distribution of images, with separate modes and a continuous part.

There are two sizes and nine places, no more: a network of this size then has the capacity for an emoji's details.

The captions need nothing. The images need the emoji's bitmaps, which are not bundled: `tools/tiny_teacher/glyphs.py`
reads them from the font.
"""

# B batch, P pixels along a side, E emoji

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from arcflow_jax.demo import ASSETS, SIDE
from arcflow_jax.demo.captions import POSITION_WORDS, POSITIONS, Captions
from arcflow_jax.demo.world import World


def read_names() -> dict[str, str]:
    """Each name in captions, and its character."""
    lines = (ASSETS / "emoji" / "names.txt").read_text(encoding="utf-8").splitlines()
    return {name: character for character, name in (line.split(maxsplit=1) for line in lines if line[0] != "#")}


NAMES = tuple(read_names())
# Each attribute's values; -1 in an attribute array means that the caption omits the attribute.
SIZES = ("small", "large")
BACKGROUNDS = ("white", "gray", "black", "pink", "orange", "green", "blue", "purple")
ATTRIBUTES = {"emoji": NAMES, "size": SIZES, "position": POSITIONS, "background": BACKGROUNDS}
OMITTED = {"size": 0.3, "position": 0.3, "background": 0.5}  # probability that a caption omits the attribute

WIDTH = np.array([40, 56], np.float32)  # pixels along a side, by size
# x and y of the POSITIONS, then of the corners; 0, where the emoji touches the left or upper edge of the image, to 1
PLACE = np.array([[0, 1], [2, 1], [1, 0], [1, 2], [1, 1], [0, 0], [2, 0], [0, 2], [2, 2]], np.float32) / 2
BACKGROUND_RGB = np.array(
    [
        [245, 245, 245],
        [130, 130, 130],
        [15, 15, 15],
        [245, 175, 200],
        [245, 165, 90],
        [120, 190, 120],
        [100, 160, 235],
        [150, 110, 205],
    ],
    np.float32,
)
SHADE = 8  # a background differs by at most this from its name's colour, or from a mixture of two, of 255


@dataclasses.dataclass(frozen=True)
class Caption:
    """What a caption asks for: the index of each attribute's value, -1 if it is omitted."""

    emoji: int
    size: int = -1
    position: int = -1
    background: int = -1

    def __str__(self) -> str:
        words = [NAMES[self.emoji]]
        if self.size >= 0:
            words.insert(0, SIZES[self.size])
        if self.position >= 0:
            words.append(POSITION_WORDS[self.position])
        if self.background >= 0:
            colour = BACKGROUNDS[self.background]
            words.append(f"on {'an' if colour == 'orange' else 'a'} {colour} background")
        return " ".join(words)

    def as_array(self) -> np.ndarray:  # [4], in the order of ATTRIBUTES
        return np.array(dataclasses.astuple(self))


CAPTIONS = Captions(Caption, ATTRIBUTES, OMITTED)
WORLD = World(captions=CAPTIONS, folder=ASSETS / "emoji", judge_sizes={"widths": (32, 64, 128, 128), "features": 128})


def any_or(key: jax.Array, chosen: jax.Array, values: np.ndarray) -> jax.Array:
    """The chosen entries [B, …] of values [·, …], or any entry where none is chosen, -1."""
    drawn = jax.random.randint(key, chosen.shape, 0, len(values))
    return jnp.asarray(values)[jnp.where(chosen < 0, drawn, chosen)]


def render(key: jax.Array, attributes: jax.Array, glyphs: jax.Array) -> jax.Array:
    """Images [B, P, P, 3] in [-1, 1] for captions with attributes [B, 4]; `key` draws what the captions leave open.

    Args:
      key: a random key.
      attributes: indices of the attributes' values.
      glyphs: the emoji's bitmaps [E, P, P, 4] in the order of NAMES, RGBA, uint8, premultiplied by alpha.
    """
    emoji, size, position, background = attributes.T
    batch = len(attributes)
    size_key, place_key, mix_key, other_key, share_key, shade_key = jax.random.split(key, 6)

    width = any_or(size_key, size, WIDTH)
    corner = any_or(place_key, position, PLACE) * (SIDE - width)[:, None]  # x, y

    colours = jnp.asarray(BACKGROUND_RGB)
    first, second = (colours[jax.random.randint(key, (batch,), 0, len(colours))] for key in (mix_key, other_key))
    mixture = first + jax.random.uniform(share_key, (batch, 1)) * (second - first)
    back = jnp.where(background[:, None] < 0, mixture, colours[background])
    back += jax.random.uniform(shade_key, back.shape, minval=-SHADE, maxval=SHADE)

    def place(glyph: jax.Array, width: jax.Array, corner: jax.Array) -> jax.Array:
        scale, row_column = jnp.broadcast_to(width / SIDE, 2), corner[::-1]
        return jax.image.scale_and_translate(
            glyph, (SIDE, SIDE, 4), (0, 1), scale, row_column, method="linear", antialias=True
        )

    front = jax.vmap(place)(glyphs[emoji].astype(jnp.float32), width, corner)
    pixels = front[..., :3] + (1 - front[..., 3:] / 255) * back[:, None, None]  # premultiplied "over"
    return pixels / 127.5 - 1
