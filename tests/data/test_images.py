"""Folders of real images: their captions, their pixels, their latents."""

from __future__ import annotations

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from arcflow_jax.data.images import CaptionedImages, pixels, read_image, read_images
from arcflow_jax.errors import UserError
from arcflow_jax.families.latents import pack
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.parallel.mesh import make_mesh
from arcflow_jax.training.latents import LatentEncoder, _encode


def save(file, size=(8, 8), color=(255, 0, 0)):
    Image.new("RGB", size, color).save(file)
    return file


def test_captions_beside_the_images(tmp_path):
    for name, caption in (("b.png", " a dog\n"), ("a.jpg", "a cat")):
        save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    (tmp_path / "notes.md").write_text("not an image")
    assert read_images(tmp_path) == [
        CaptionedImages((tmp_path / "a.jpg",), "a cat"),
        CaptionedImages((tmp_path / "b.png",), "a dog"),
    ]


def test_captions_in_one_file(tmp_path):
    (tmp_path / "sub").mkdir()
    save(tmp_path / "sub" / "x.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "sub/x.png", "text": "a fox", "width": 8}) + "\n")
    assert read_images(tmp_path) == [CaptionedImages((tmp_path / "sub" / "x.png",), "a fox")]


def test_folders_that_do_not_do_are_refused(tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            read_images(tmp_path / "f")

    refused("f does not exist")
    (tmp_path / "f").mkdir()
    refused("holds no images")
    save(tmp_path / "f" / "a.png")
    refused("a.png has no caption: there is neither a.txt nor metadata.jsonl")
    (tmp_path / "f" / "a.txt").write_text(" \n")
    refused("the caption of .*a.png is empty")
    (tmp_path / "f" / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    refused("metadata.jsonl, line 1: it has to be")
    (tmp_path / "f" / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "x"}\n')
    refused("metadata.jsonl, line 1: there is no .*b.png")


def test_pixels_cover_the_size_and_the_middle_is_kept(tmp_path):
    """A wide image, its left and right quarters of another colour: they are what is cut."""
    image = Image.new("RGB", (64, 32), (0, 255, 0))
    image.paste((255, 0, 0), (16, 0, 48, 32))
    image.save(tmp_path / "wide.png")
    array = pixels(tmp_path / "wide.png", 16, 16)
    assert array.shape == (16, 16, 3)
    np.testing.assert_allclose(array[:, 4:12], np.broadcast_to([1, -1, -1], (16, 8, 3)), atol=0.02)
    with pytest.raises(UserError, match=r"gone\.png is missing"):
        pixels(tmp_path / "gone.png", 16, 16)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read image"):
        pixels(tmp_path / "broken.png", 16, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_data_say(tmp_path, orientation):
    """As in the table of EXIF 2.32: where the first row and the first column of what is stored are seen."""
    rows, columns = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8] += np.array([200, 0, 0], np.uint8)
    stored[:, :12] += np.array([0, 0, 200], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    seen = np.asarray(read_image(tmp_path / "a.png"))
    assert seen.shape[:2] == ((16, 24) if orientation < 5 else (24, 16))
    halves = {"top": np.s_[:8], "bottom": np.s_[-8:], "left": np.s_[:, :8], "right": np.s_[:, -8:]}
    for side, channel in ((rows, 0), (columns, 2)):
        assert seen[halves[side]][..., channel].min() == 200, (side, channel)
    assert seen.mean() == stored.mean()


@pytest.mark.parametrize("tag", [0, 26])
def test_damaged_exif_data_are_refused(tmp_path, tag):
    """A text under the number of a tag of another type. Pillow fails when it writes the data of a turned image."""
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "hello", 6
    damaged = exif.tobytes().replace(b"\x01\x0e\x00\x02", bytes([1, tag, 0, 2]))
    assert damaged != exif.tobytes()
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png", exif=damaged)
    with pytest.raises(UserError, match="cannot read image"):
        read_image(tmp_path / "a.png")


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    values = np.array([[0, 128, 129, 257 * 7, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 0, 1, 7, 255]


def test_transparency_is_over_white(tmp_path):
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 51))  # a fifth red
    half.save(tmp_path / "rgba.webp", lossless=True)
    Image.new("LA", (2, 2), (0, 51)).save(tmp_path / "la.png")
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=1)
    found = {file.stem: np.asarray(read_image(file))[0, 0].tolist() for file in tmp_path.iterdir()}
    assert found == {"rgba": [255, 204, 204], "la": [204, 204, 204], "p": [255, 255, 255]}


def test_metadata_of_other_programs(tmp_path):
    """A byte order mark first, Windows line ends, and a line separator of Unicode in a caption."""
    save(tmp_path / "a.png")
    line = json.dumps({"file_name": "a.png", "text": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}\r\n".encode())
    assert [image.caption for image in read_images(tmp_path)] == ["a\u2028b"] * 2


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "sub/../../a.png", "a\nb.png"])
def test_metadata_that_leaves_its_folder_is_refused(tmp_path, name):
    save(tmp_path / "a.png")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a cat"}))
    with pytest.raises(UserError, match=r"metadata.jsonl, line 1: file_name is '.*', but has to be a path inside"):
        read_images(tmp_path / "f")


def test_files_that_are_no_images_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")  # which would wait for a writer
    with pytest.raises(UserError, match=r"pipe\.png is not a regular file"):
        read_image(tmp_path / "pipe.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", "TIFF")
    with pytest.raises(UserError, match=r"cannot read image .*a\.png: cannot identify image file"):
        read_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)
    with pytest.raises(UserError, match=r"cannot read image .*: Image size \(64 pixels\) exceeds limit of 63"):
        read_image(save(tmp_path / "b.png"))


def test_latents_are_those_of_the_vae(tiny_flux, tmp_path):
    directory = ModelDirectory.open(tiny_flux)
    rng = np.random.default_rng(0)
    images = []
    for i in range(2):
        file = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (32, 48, 3), np.uint8)).save(file)
        images.append(CaptionedImages((file,), "x"))
    encode = LatentEncoder(directory, "float32", make_mesh((1, 1, 1, 1)), accumulate=2)
    (pixels,) = encode.pixels(images, 32, 48)
    tokens = encode(pixels)
    assert tokens.shape == (2, 2 * 3, 16)
    one, two = (_encode.lower(encode.graphdef, encode.state, pixels, parts).compile() for parts in (1, 2))
    assert two.memory_analysis().temp_size_in_bytes < 0.7 * one.memory_analysis().temp_size_in_bytes
    vae = nnx.merge(encode.graphdef, encode.state)
    images = jnp.stack([jnp.asarray(np.asarray(Image.open(p.files[0])), jnp.float32) / 127.5 - 1 for p in images])
    np.testing.assert_allclose(tokens, pack(vae.encode(images)), atol=1e-4)
