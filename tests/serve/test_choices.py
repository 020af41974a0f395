"""What the page offers, and settings that are read back from a PNG, without a browser."""

from __future__ import annotations

import base64
import copy
import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from arcflow_jax.data.output import png
from arcflow_jax.errors import UserError
from arcflow_jax.sampling_settings import sides
from arcflow_jax.serve.choices import SEED, Choice, Offer, comparison, read_back
from arcflow_jax.serve.images import Images
from arcflow_jax.serve.requests import order
from arcflow_jax.serve.settings import Settings, Start
from arcflow_jax.serve.start_image import MOST, References, StartImage, open_image, open_references, read_mask
from tests.serve.conftest import LIMITS

OFFER = Offer(
    sizes=("64x32", "32x64"),
    steps=(2, 4),
    guidance=(2.0, 10.0),
    loras={"grain": 0.0, "water, colour:2": 0.5},
    edits=True,
    references=2,
    fixed={
        "model": "teacher",
        "adapter": "student",
        "final_step_ratio": "1.0",
        "negative_prompt": "",
    },
)
INFO = {
    "prompt": "a red fox",
    "image": 0,
    "seed": 7,
    "steps": 4,
    "guidance": 3.25,
    "final_step_ratio": 1.0,
    "model": "checkpoints/teacher",
    "adapter": "runs/student",
}


def read(tmp_path, offer: Offer = OFFER, size=(64, 32), **info):
    """What is read back from a PNG of `INFO` with these changes; None leaves an entry out."""
    image = Image.new("RGB", size)
    image.info = {name: value for name, value in (INFO | info).items() if value is not None}
    file = tmp_path / "image.png"
    file.write_bytes(png(image))
    return read_back(str(file), offer, LIMITS)


def test_all_settings_are_read_back(tmp_path):
    found = read(tmp_path, loras="folder/grain.safetensors:-0.5, water, colour:2:1.25")
    assert dataclasses.astuple(found) == ("a red fox", 7, "64x32", 4, 3.25, None, [-0.5, 1.25], [])
    assert read(tmp_path).loras == [0.0, 0.0]  # made without LoRAs, whatever those of the start


@pytest.mark.parametrize(
    ("change", "kept", "note"),
    [
        ({"seed": SEED + 1}, "seed", f"Its seed {SEED + 1} is not offered"),
        ({"size": (64, 64)}, "size", "Its size 64x64"),
        ({"steps": 3}, "steps", "Its number of steps 3"),
        ({"guidance": 11.0}, "guidance", "Its guidance 11.0"),
        ({"loras": "grain:3"}, None, "Its strength of the LoRA grain, 3.0"),
        ({"loras": "other:1"}, None, "Its LoRA other is not loaded here."),
        ({"image": 2}, None, "It is image 2 of its seed."),
        ({"strength": 0.8}, None, "Choose that image again."),
        ({"adapter": None}, None, "Its adapter: none. Here: student."),
        ({"model": "another"}, None, "Its model: another. Here: teacher."),
        ({"references": 2}, None, "It had reference images. Choose those images again."),
        ({"negative_prompt": "a/b"}, None, "Its negative prompt: a/b. Here: none."),
    ],
)
def test_what_cannot_be_had_again_is_told(tmp_path, change, kept, note):
    found = read(tmp_path, **change)
    assert len(found.notes) == 1
    assert note in found.notes[0]
    without = {name for name, value in vars(found).items() if value is None} - {"strength"}
    assert without == ({kept} if kept else set())
    assert found.strength == change.get("strength")


@pytest.mark.parametrize("change", [{"seed": "x"}, {"prompt": None}, {"loras": "grain:much"}])
def test_a_png_without_settings(tmp_path, change):
    with pytest.raises(UserError, match="no settings in it"):
        read(tmp_path, **change)
    (tmp_path / "image.png").write_text("no image")
    with pytest.raises(UserError, match="no settings in it"):
        read_back(str(tmp_path / "image.png"), OFFER, LIMITS)


def test_a_choice_becomes_a_request(tmp_path):
    fitted = {size: Start(np.zeros((*sides(size)[::-1], 3), np.uint8), None) for size in OFFER.sizes}
    choice = Choice("a red fox", None, "64x32", 4, 3.0, 0.5, StartImage(fitted), None, (0.0, 0.5))
    assert choice.generation(OFFER).loras is None  # those of the start: it shares their batches
    choice = dataclasses.replace(choice, loras=(0.0, 0))
    default = Settings(32, 64, 2)

    def wanted(choice):
        return order(choice.generation(OFFER), default, LIMITS, lambda settings: None, *choice.given())

    found = wanted(choice)
    assert found.settings == Settings(64, 32, 4, 3.0, strength=0.5, loras=())
    assert (found.prompt, found.seed, found.count, found.start) == ("a red fox", 0, 1, fitted["64x32"])
    images = References({size: Start(np.stack([each.pixels] * 2), None) for size, each in fitted.items()})
    with pytest.raises(UserError, match="not both"):
        wanted(dataclasses.replace(choice, references=images))
    found = wanted(dataclasses.replace(choice, start=None, references=images))
    assert found.settings == Settings(64, 32, 4, 3.0, references=2, loras=())
    assert found.start.pixels.shape == (2, 32, 64, 3)
    assert wanted(dataclasses.replace(choice, start=None)).settings == Settings(64, 32, 4, 3.0, loras=())
    without = dataclasses.replace(OFFER, guidance=None)
    assert choice.generation(without, negative_prompt="").guidance is None


def test_a_teacher_compiles_what_it_is_compared_in():
    """Each number of reference images, and either classifier-free guidance or a guidance embedding."""

    def pipeline(embedded: bool):
        def described(**size):
            return {"width": 64, "height": 32, "steps": 50}

        directory = SimpleNamespace(
            config=lambda name: SimpleNamespace(guidance_embeds=embedded),
            family=SimpleNamespace(references=SimpleNamespace(most=4)),
        )
        return SimpleNamespace(student=None, directory=directory, described=described)

    starts = [{}, {"strength": 0.6}, {"strength": 0.6, "masked": True}, *({"references": n} for n in (1, 2, 3, 4))]
    for embedded, negative in ((True, None), (False, "")):
        expected = [Settings(64, 32, 50, negative_prompt=negative, **start) for start in starts]
        assert comparison(pipeline(embedded), [(64, 32)], True) == expected
        assert comparison(pipeline(embedded), [(64, 32)], False) == expected[:1]


# --- the image to start from ---


def data_url(alpha: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(np.dstack([np.zeros((*alpha.shape, 3), np.uint8), alpha])).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def test_an_image_is_fitted_and_painted(tmp_path):
    half = np.zeros((100, 100, 3), np.uint8)
    half[:, 50:] = 255  # right
    Image.fromarray(half).save(tmp_path / "photo.png")
    image = open_image(tmp_path / "photo.png", OFFER.sizes)
    # 64x32 shows the middle of the height, 32x64 that of the width: the edge stays in the middle
    for size in OFFER.sizes:
        width, height = sides(size)
        pixels = image.start(size).pixels
        assert pixels.shape == (height, width, 3)
        assert (pixels[:, : width // 2 - 4] == 0).all()
        assert (pixels[:, width // 2 + 4 :] == 255).all()
        assert image.start(size).repaint is None
    alpha = np.zeros((32, 64), np.uint8)
    alpha[:8], alpha[8:16] = 255, 100  # the edge of a stroke is soft
    painted = image.painted(read_mask(data_url(alpha), 2048))
    assert np.array_equal(painted.start("64x32").repaint, alpha == 255)
    assert painted.start("32x64").repaint is None  # painted in the other size
    assert painted.painted(np.zeros((32, 64), bool)).start("64x32").repaint is None
    assert painted.painted(np.ones((16, 16), bool)).masked is None  # of a size that is not served


def test_what_is_no_image_is_refused(tmp_path):
    file = tmp_path / "photo.png"
    file.write_text("no image")
    with pytest.raises(UserError, match="one of PNG, JPEG, WEBP"):
        open_image(file, OFFER.sizes)
    Image.new("1", (MOST // 1000 + 1, 1000)).save(file)
    with pytest.raises(UserError, match="at most 33 million pixels"):
        open_image(file, OFFER.sizes)
    with pytest.raises(UserError, match=r"There are 3 reference images\. The model reads 2 at most\."):
        open_references([file] * 3, OFFER.sizes, 2)


def test_reference_images_are_in_order_and_fitted(tmp_path):
    for number, shade in enumerate((50, 200)):
        Image.new("RGB", (100, 60 + number), (shade, 0, 0)).save(tmp_path / f"{number}.png")
    images = open_references([tmp_path / "0.png", tmp_path / "1.png"], OFFER.sizes, 2)
    assert len(images) == 2
    for size in OFFER.sizes:
        width, height = sides(size)
        assert images.fitted[size].pixels.shape == (2, height, width, 3)
        assert [each[0, 0, 0] for each in images.fitted[size].pixels] == [50, 200]


# --- what the page shows ---


def labels(engine, teacher=None) -> set[str]:
    """Labels of the page's visible parts."""
    page = pytest.importorskip("arcflow_jax.serve.page")
    blocks = page.page(engine, teacher, LIMITS, Images(60))
    parts = [each for each in blocks.blocks.values() if getattr(each, "visible", True)]
    return {str(getattr(each, "label", None) or getattr(each, "value", "")) for each in parts}


def test_only_what_the_server_offers_is_shown(engine):
    everything = {"Style LoRAs", "grain", "Start from an image", "Compare", "Guidance"}
    assert everything <= labels(engine, engine)
    assert "Reference images" not in labels(engine, engine)  # FLUX.1 reads none
    plain = copy.copy(engine)
    plain.loras, plain.declared = {}, [each for each in engine.declared if each.strength is None]
    shown = labels(plain)
    assert shown & everything == {"Guidance"}
    assert {"Prompt", "Seed", "Size", "Steps", "Keep"} <= shown
