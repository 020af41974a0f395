"""Folders of real images: their captions, their pixels, their latents."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from arcflow_jax.checkpoints.model_directory import ModelDirectory
from arcflow_jax.data.images import CaptionedImage, pixels, read_images
from arcflow_jax.errors import UserError
from arcflow_jax.families.latents import pack
from arcflow_jax.parallel.mesh import make_mesh
from arcflow_jax.training.latents import LatentEncoder


def save(file, size=(8, 8), color=(255, 0, 0)):
    Image.new("RGB", size, color).save(file)
    return file


def test_captions_beside_the_images(tmp_path):
    for name, caption in (("b.png", " a dog\n"), ("a.jpg", "a cat")):
        save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    (tmp_path / "notes.md").write_text("not an image")
    assert read_images(tmp_path) == [
        CaptionedImage(tmp_path / "a.jpg", "a cat"),
        CaptionedImage(tmp_path / "b.png", "a dog"),
    ]


def test_captions_in_one_file(tmp_path):
    (tmp_path / "sub").mkdir()
    save(tmp_path / "sub" / "x.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "sub/x.png", "text": "a fox", "width": 8}) + "\n")
    assert read_images(tmp_path) == [CaptionedImage(tmp_path / "sub" / "x.png", "a fox")]


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
    with pytest.raises(UserError, match="cannot read image"):
        pixels(tmp_path / "gone.png", 16, 16)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read image"):
        pixels(tmp_path / "broken.png", 16, 16)


def test_latents_are_those_of_the_vae(tiny_flux, tmp_path):
    directory = ModelDirectory.open(tiny_flux)
    rng = np.random.default_rng(0)
    images = []
    for i in range(2):
        file = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (32, 48, 3), np.uint8)).save(file)
        images.append(CaptionedImage(file, "x"))
    encode = LatentEncoder(directory, "float32", make_mesh((1, 1, 1, 1)))
    tokens = encode(images, 32, 48)
    assert tokens.shape == (2, 2 * 3, 16)
    vae = nnx.merge(encode.graphdef, encode.state)
    images = jnp.stack([jnp.asarray(np.asarray(Image.open(p.file)), jnp.float32) / 127.5 - 1 for p in images])
    np.testing.assert_allclose(tokens, pack(vae.encode(images)), atol=1e-4)
