"""The emoji world: its names, its captions and its images, and the font's bitmaps for who has the font."""

# B batch, P pixels along a side, E emoji

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from arcflow_jax.demo import emoji
from arcflow_jax.demo.emoji import BACKGROUND_RGB, BACKGROUNDS, POSITIONS, SHADE, SIDE, SIZES, Caption
from tests.helpers.paths import ROOT


def test_names_are_those_of_the_package_emoji():
    table = pytest.importorskip("emoji").EMOJI_DATA
    names = {character.replace("\ufe0f", ""): entry["en"] for character, entry in table.items()}
    for name, character in emoji.read_names().items():
        assert name == names[character].strip(":").replace("_", " ").replace("-", " ").lower()


def test_names_and_characters_are_different():
    names = emoji.read_names()
    assert 250 <= len(names) <= 400
    assert len(set(names.values())) == len(names)
    assert all(len(character) == 1 for character in names.values())


def test_caption_words():
    pizza = emoji.NAMES.index("pizza")
    assert str(Caption(pizza)) == "pizza"
    assert str(Caption(pizza, 0, 2, 6)) == "small pizza at the top on a blue background"
    assert str(Caption(pizza, size=1)) == "large pizza"


def disc(alpha: int, colour: tuple[int, int, int]) -> np.ndarray:
    """A disc that fills the bitmap, [P, P, 4] RGBA, premultiplied."""
    grid = np.arange(SIDE) + 0.5 - SIDE / 2
    inside = np.hypot(grid[:, None], grid) < SIDE / 2
    premultiplied = np.array([*(value * alpha / 255 for value in colour), alpha])
    return np.rint(inside[..., None] * premultiplied).astype(np.uint8)


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Attributes [B, 4] of every size, position and background of two discs, and images [B, P, P, 3] in [0, 255]."""
    glyphs = jnp.asarray(np.stack([disc(255, (200, 30, 60)), disc(127, (255, 255, 255))]))
    axes = (range(2), range(len(SIZES)), range(len(POSITIONS)), range(len(BACKGROUNDS)))
    attributes = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 4)
    images = jax.jit(emoji.render)(jax.random.key(0), jnp.asarray(attributes), glyphs)
    return attributes, (np.asarray(images) + 1) * 127.5


def test_background_has_the_named_colour(drawn):
    attributes, images = drawn
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]  # outside of any disc
    distance = np.abs(corners - BACKGROUND_RGB[attributes[:, 3]][:, None]).max(axis=(1, 2))
    assert distance.max() <= SHADE + 0.01
    nearest = np.abs(corners[:, :1] - BACKGROUND_RGB).sum(-1).argmin(-1)
    np.testing.assert_array_equal(nearest, attributes[:, 3])  # no two names share a colour


def test_composition_is_premultiplied(drawn):
    """The disc is a·F + (1 − a)·B inside. At the edge a pixel lies between that and B, in every channel."""
    attributes, images = drawn
    back = images[:, :1, :1]
    alpha = np.array([1, 127 / 255])[attributes[:, 0]][:, None, None, None]
    front = np.array([[200, 30, 60], [255, 255, 255]])[attributes[:, 0]][:, None, None]
    inside = alpha * front + (1 - alpha) * back
    centre = images[:, SIDE // 2 - 3 : SIDE // 2 + 3, SIDE // 2 - 3 : SIDE // 2 + 3]
    np.testing.assert_allclose(centre, np.broadcast_to(inside, centre.shape), atol=1.1)  # of the bitmap's rounding
    low, high = np.minimum(inside, back), np.maximum(inside, back)
    assert ((low - 1.1 <= images) & (images <= high + 1.1)).all()


def test_place_and_size_are_those_of_the_caption(drawn):
    attributes, images = drawn
    shown = np.abs(images - images[:, :1, :1]).max(-1) > 20
    visible = shown.any((1, 2))  # a white disc over white is not
    assert visible.mean() > 0.8
    rows, columns = shown.any(2), shown.any(1)
    for (_, size, position, _), row, column in zip(attributes[visible], rows[visible], columns[visible], strict=True):
        (y,), (x,) = np.nonzero(row), np.nonzero(column)
        width = np.ptp(x) + 1
        assert abs(width - emoji.WIDTH[size]) <= 1
        x, y = x.mean() - (SIDE - 1) / 2, y.mean() - (SIDE - 1) / 2
        margin = (SIDE - width) / 2
        wanted = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}
        np.testing.assert_allclose((x, y), margin * np.array(wanted[POSITIONS[position]]), atol=1)


def test_what_is_left_open_takes_every_value():
    glyphs = jnp.asarray(disc(255, (200, 30, 60)))[None]
    attributes = jnp.array([[0, -1, -1, 2]] * 400)  # over black
    images = (np.asarray(jax.jit(emoji.render)(jax.random.key(1), attributes, glyphs)) + 1) * 127.5
    boxes = set()
    for image in images[..., 0] > 100:
        (y,), (x,) = np.nonzero(image.any(1)), np.nonzero(image.any(0))
        boxes.add((np.ptp(x) > 48, *(np.sign(np.rint((side.mean() - (SIDE - 1) / 2) / 2)) for side in (x, y))))
    assert len(boxes) == 2 * 9


def test_bitmaps_show_what_the_font_shows():
    """Composition at full size, then halving, is halving with premultiplied alpha, then composition."""
    pytest.importorskip("fontTools")
    from tools.tiny_teacher.glyphs import FONT, read_glyphs

    if not FONT.exists():
        pytest.skip("the font is not installed")
    from fontTools.ttLib import TTFont

    file = TTFont(FONT)
    glyphs = read_glyphs("🍕🐙").astype(float)
    assert glyphs.shape == (2, SIDE, SIDE, 4)
    for character, glyph in zip("🍕🐙", glyphs, strict=True):
        data = file["CBDT"].strikeData[0][file.getBestCmap()[ord(character)]].imageData
        image = Image.open(io.BytesIO(data)).convert("RGBA").crop((4, 0, 132, 128))
        red = Image.new("RGBA", image.size, (255, 0, 0, 255))
        full = np.asarray(Image.alpha_composite(red, image).convert("RGB"), float)
        halved = full.reshape(SIDE, 2, SIDE, 2, 3).mean((1, 3))
        ours = glyph[..., :3] + (1 - glyph[..., 3:] / 255) * np.array([255, 0, 0])
        np.testing.assert_allclose(ours, halved, atol=3)  # of roundings to 8 bits
        assert (glyph[..., :3] <= glyph[..., 3:] + 1).all()


def test_font_is_not_bundled():
    assert sorted(path.name for path in (ROOT / "arcflow_jax/assets/emoji").iterdir()) == [
        "NOTICE.md",
        "judge.safetensors",
        "names.txt",
        "prompts-test.txt",
        "prompts-train.txt",
        "true-features.safetensors",
    ]
