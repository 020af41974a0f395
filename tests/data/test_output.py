"""Images on disk: their names, their settings, and that none is overwritten."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from arcflow_jax.data import output
from arcflow_jax.data.output import file_name, read_latents, save_image, save_new_image
from arcflow_jax.errors import UserError
from tests.helpers.full_disk import disk_for_files_up_to

INFO = {"prompt": "A red fox, in the snow!", "image": 7, "seed": 3, "steps": 2, "adapter": "runs/flux.v2"}


def image(**changes: object) -> Image.Image:
    """Noise, so that it takes some kilobytes, with settings; None leaves one out."""
    made = Image.effect_noise((64, 64), 50).convert("RGB")
    made.info = {name: value for name, value in (INFO | changes).items() if value is not None}
    return made


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "0007-seed3-2steps-flux-v2-a-red-fox-in-the-snow.png"),
        ({"adapter": "owner/flux-2nfe"}, "0007-seed3-2steps-flux-2nfe-a-red-fox-in-the-snow.png"),
        ({"adapter": None, "steps": 50}, "0007-seed3-50steps-teacher-a-red-fox-in-the-snow.png"),
        ({"seed": None, "prompt": "línea"}, "0007-2steps-flux-v2-línea.png"),
        ({"prompt": "!!"}, "0007-seed3-2steps-flux-v2.png"),
    ],
)
def test_name(changes, name):
    assert file_name(image(**changes)) == name


def test_long_names_are_cut():
    assert len(file_name(image(prompt="a " * 500, adapter="b" * 500))) < 150


def test_names_fit_a_file_system(tmp_path):
    """255 bytes, whatever the script: a character may take four."""
    long = image(prompt="𠀀" * 100, adapter="𠀀" * 100)
    path = tmp_path / file_name(long)
    save_image(long, path)
    save_new_image(long, path)
    assert len(list(tmp_path.iterdir())) == 2


def test_no_file_is_overwritten(tmp_path):
    names = [save_new_image(image(), tmp_path / "a.b.png").name for _ in range(3)]
    assert names == ["a.b.png", "a.b-2.png", "a.b-3.png"]


@pytest.mark.parametrize("links", [True, False])
def test_nor_is_one_that_appears_meanwhile(tmp_path, monkeypatch, links):
    """Another process writes the same name after this one has looked."""
    path, write = tmp_path / "grid.png", output.write_file

    def other_first(name, *args, **options):
        if name == path:
            path.write_text("other")
        write(name, *args, **options)

    def no_links(*_):
        raise PermissionError("this disk has none")

    monkeypatch.setattr(output, "write_file", other_first)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    assert save_new_image(image(), path).name == "grid-2.png"
    assert path.read_text() == "other"
    assert Image.open(tmp_path / "grid-2.png").size == (64, 64)
    assert len(list(tmp_path.iterdir())) == 2


def test_settings_are_saved_as_text(tmp_path):
    save_image(made := image(), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.text == {name: str(value) for name, value in INFO.items()}
        assert saved.tobytes() == made.tobytes()
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def damaged_npy(shape: object) -> bytes:
    """A .npy file whose header promises an array of this shape."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", b""),
        ("a.npy", b"\x93NUMPY"),
        ("a.npy", damaged_npy((10**12,))),  # four terabytes, none of which may be allocated
        ("a.npy", damaged_npy((2**62, 2**62))),
        ("a.npy", damaged_npy((-4, 4))),
        ("a.npy", damaged_npy("(4, (")),
        ("a.npy", damaged_npy("__import__('os').system('true')")),
        ("a.npy", pickle.dumps([1])),
        ("a.safetensors", b"\xff" * 100),
        ("a.txt", b""),
    ],
)
def test_latents_that_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"latents .*{name}|{name} is truncated"):
        read_latents(tmp_path / name)


def test_latents_that_are_no_array(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.array([{}], object), allow_pickle=True)
    os.mkfifo(tmp_path / "c.npy")
    save_file({"a": np.ones(3), "b": np.ones(3)}, tmp_path / "d.safetensors")
    for name, message in {
        "a.npy": "cannot read latents",
        "b.npy": "cannot read latents",
        "c.npy": "is not a regular file",
        "d.safetensors": "has to hold one tensor, not 2",
    }.items():
        with pytest.raises(UserError, match=message):
            read_latents(tmp_path / name)


def test_latents_come_back(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "a.npy", array)
    save_file({"x": array}, tmp_path / "a.safetensors")
    for name in ("a.npy", "a.safetensors"):
        np.testing.assert_array_equal(read_latents(tmp_path / name), array)


def test_full_disk_leaves_nothing(tmp_path):
    with disk_for_files_up_to(1000), pytest.raises(UserError, match=r"^cannot write .*/a\.png: File too large$"):
        save_image(image(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
