"""Distillation with reference images: the folder of instructions, what a training step gets of it, and whole steps."""

# B batch, R tokens of reference images, C latent channels

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from arcflow_jax.data.images import CaptionedImages, pixels, read_images
from arcflow_jax.errors import UserError
from arcflow_jax.families.flux2 import reference_positions
from arcflow_jax.families.latents import pack
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.conditioning import referring
from arcflow_jax.parallel.mesh import make_mesh
from arcflow_jax.training.compile import of_size
from arcflow_jax.training.latents import LatentEncoder
from arcflow_jax.training.loop import train
from arcflow_jax.training.plan import Plan
from arcflow_jax.training.recipe import Recipe
from tests.helpers.processes import finish, start
from tests.helpers.tiny_flux2 import make_tiny_flux2
from tests.helpers.tiny_run import losses
from tests.helpers.twins import flux2_inputs
from tests.helpers.whole_path import cut_down


def save(file: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 16, 3), np.uint8)).save(file)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eight instructions with two reference images each."""
    folder = tmp_path / "instructions"
    folder.mkdir()
    lines = []
    for i in range(8):
        names = [f"{i}-{place}.png" for place in range(2)]
        for place, name in enumerate(names):
            save(folder / name, 2 * i + place)
        lines.append(json.dumps({"file_names": names, "text": f"put ring {i} onto the square"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    source = make_tiny_flux2(tmp_path_factory.mktemp("flux2") / "source")
    return convert_model(source, source.with_name("model"))


def recipe(model: Path, out: Path, references: Path, **changes) -> Recipe:
    changes = {"mesh": (1, 1, 1, 1), "batch": 8, "steps": 1, "adapter": {"dropout": 0.0}} | changes
    return cut_down("flux2:4b", model, out, 16, references=str(references), **changes)


def test_instructions_of_a_folder(folder, tmp_path):
    found = read_images(folder, 4)
    assert found[3] == CaptionedImages((folder / "3-0.png", folder / "3-1.png"), "put ring 3 onto the square")
    beside = tmp_path / "beside"
    beside.mkdir()
    save(beside / "a.png", 0)
    (beside / "a.txt").write_text("make it blue\n")
    assert read_images(beside, 4) == [CaptionedImages((beside / "a.png",), "make it blue")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"file_names": ["0-0.png"]}, r'line 9: it has to be \{"file_name": …, "text": …\}, or \{"file_names": \[…\]'),
        ({"file_names": ["0-0.png"], "text": " "}, "the caption of .*0-0.png is empty"),
        ({"file_names": ["0-0.png"] * 5, "text": "x"}, "line 9: file_names has 5 images, but has to have 1 to 4"),
        ({"file_names": [], "text": "x"}, "line 9: file_names has 0 images, but has to have 1 to 4"),
        ({"file_names": ["0-0.png", "no.png"], "text": "x"}, "line 9: there is no .*no.png"),
        ({"file_names": ["0-0.png", "../a.png"], "text": "x"}, "line 9: file_name is '../a.png', but has to be a path"),
        ({"file_name": "0-0.png", "text": "x"}, "belongs to 2 reference images, .*0-0.png belongs to 1: all captions"),
    ],
)
def test_wrong_instructions_are_refused(folder, line, message):
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps(line))
    with pytest.raises(UserError, match=message):
        read_images(folder, 4)


def test_an_image_without_instruction_is_refused(folder):
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"0-0.png has no caption: there is neither 0-0.txt nor metadata.jsonl"):
        read_images(folder, 4)


def test_recipes_that_do_not_fit(model, tiny_flux, folder, tmp_path):
    with pytest.raises(UserError, match="images and references are both set"):
        recipe(model, tmp_path / "run", folder, images=str(folder))
    with pytest.raises(UserError, match="is a FluxPipeline, which reads no reference images"):
        Plan.make(recipe(tiny_flux, tmp_path / "run", folder))


def test_what_a_training_step_gets(model, folder):
    """The latents of both images, one after the other; and the shapes of another size."""
    directory = ModelDirectory.open(model)
    encode = LatentEncoder(directory, "float32", make_mesh((1, 1, 1, 1)))
    examples = read_images(folder, 4)[:2]

    def of(height: int, width: int):
        _, _, c = flux2_inputs(directory.config("transformer"), height // 4, width // 4, 3)
        positions = reference_positions([(height // 4, width // 4)] * 2)
        return referring(c, encode.references(encode.pixels(examples, height, width), positions))

    conditioning = of(16, 12)
    vae = nnx.merge(encode.graphdef, encode.state)
    for place in range(2):
        # Scaled by 0.8, because it has to cover the size, and cropped
        images = [Image.open(each.files[place]).resize((13, 16), Image.Resampling.LANCZOS) for each in examples]
        whole = jnp.stack([jnp.asarray(np.asarray(image), jnp.float32)[:, :12] / 127.5 - 1 for image in images])
        found = conditioning.references.tokens[:, 12 * place : 12 * (place + 1)]
        assert jnp.corrcoef(found.ravel(), pack(vae.encode(whole)).ravel())[0, 1] > 0.8
    shapes, expected = (jax.tree.map(jnp.shape, each) for each in (of_size(conditioning, 6), of(8, 12)))
    assert shapes == expected


EIGHT = (2, 2, 1, 2)
ON_EIGHT = """
    import sys
    from pathlib import Path
    from arcflow_jax.training.loop import train
    from tests.training.test_references import EIGHT, recipe
    train(recipe(*map(Path, sys.argv[1:]), mesh=EIGHT, accumulate=2))
"""


@pytest.mark.slow
def test_a_training_step_on_one_device_and_on_eight(model, folder, tmp_path):
    """In one batch; and in two, with the tokens split over two devices. Other reference images give another loss."""
    other = shutil.copytree(folder, tmp_path / "other")
    for file in other.glob("*.png"):
        save(file, 99)
    previews = {"preview_every": 1, "preview_prompts": ("a", "b")}
    runs = [train(recipe(model, tmp_path / f"run-{each.name}", each, **previews)) for each in (folder, other)]
    one, changed = map(losses, runs)
    finish(start(8, "-c", textwrap.dedent(ON_EIGHT), model, tmp_path / "eight", folder))
    np.testing.assert_allclose(losses(tmp_path / "eight"), one, rtol=1e-5)
    assert abs(changed[0] - one[0]) > 1e-4 * one[0]

    # Two rows of previews: both references as the run has them, and what is made of them; 16 pixels are drawn as 192
    sheets = [np.asarray(Image.open(run / "previews" / "000001.png").convert("RGB"), int) for run in runs]
    sheet, without = ([each[40 + 212 * row :][:192:12] for row in range(2)] for each in sheets)
    assert sheets[0].shape == (20 + 2 * 212, 5 * 196 - 4, 3)
    for row in range(2):
        for place in range(2):
            expected = np.rint((pixels(folder / f"{row}-{place}.png", 16, 16) + 1) * 127.5)
            np.testing.assert_array_equal(sheet[row][:, 196 * place :][:, :192:12], expected)
        assert np.any(sheet[row][:, 392:584] != without[row][:, 392:584])  # the teacher's
