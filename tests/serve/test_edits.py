"""Images to start from and style LoRAs, over HTTP: OpenAI's client, batches, wrong files."""

from __future__ import annotations

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from arcflow_jax import generate
from arcflow_jax.serve import api, images
from arcflow_jax.serve.engine import Engine
from arcflow_jax.serve.metrics import Metrics
from arcflow_jax.serve.settings import declared
from tests.serve.asking import EDITS, PROMPT, asked, difference, figures, file, opened, post
from tests.serve.conftest import LIMITS

RNG = np.random.default_rng(0)
PHOTOS = [
    Image.fromarray(RNG.integers(0, 256, (4, 8, 3), np.uint8)).resize((64, 32), Image.Resampling.BICUBIC)
    for _ in range(3)
]
REPAINT = np.zeros((32, 64), bool)
REPAINT[8:24, 16:48] = True
# Transparent, but not fully, on the right, which stays
ALPHA = np.where(REPAINT, 0, np.where(np.arange(64) < 48, 255, 1)).astype(np.uint8)


def mask(alpha: np.ndarray = ALPHA) -> bytes:
    return file(Image.fromarray(np.dstack([np.full((*alpha.shape, 3), 9, np.uint8), alpha])))


PHOTO = file(PHOTOS[0])


def expected(engine, **settings) -> list[Image.Image]:
    return engine.pipeline(PROMPT, batch_size=4, **settings).images


def edit(client, photo: Image.Image, prompt: str = PROMPT, **more: object) -> Image.Image:
    """The image of seed 3."""
    answer = client.images.edit(image=file(photo), prompt=prompt, extra_body={"seed": 3} | more)
    return opened(answer.data[0].b64_json)


def form(files: dict[str, bytes] | None = None, origin: str | None = None, **fields: str) -> httpx.Request:
    sent = {name: (f"{name}.png", data) for name, data in ({"image": PHOTO} if files is None else files).items()}
    headers = {} if origin is None else {"Origin": origin}
    return httpx.Request("POST", f"http://test{EDITS}", data={"prompt": "x"} | fields, files=sent, headers=headers)


def test_openais_client(client, engine):
    programs = generate.sample_student._cache_size()
    shared = {"image": PHOTO, "prompt": PROMPT, "n": 2, "size": "64x32", "model": "student"}
    answer = client.images.edit(mask=mask(), extra_body={"seed": 7, "strength": 0.8}, **shared)
    shown = [opened(each.b64_json) for each in answer.data]
    assert (answer.size, answer.seed) == ("64x32", 7)
    settings = {"image": PHOTOS[0], "strength": 0.8, "num_images_per_prompt": 2, "seed": 7}
    inpainted = expected(engine, mask_image=REPAINT, **settings)
    assert [difference(*pair) <= 1 for pair in zip(shown, inpainted, strict=True)] == [True, True]
    for image in shown:
        assert np.array_equal(np.asarray(image)[~REPAINT], np.asarray(PHOTOS[0])[~REPAINT])
        assert image.info["strength"] == "0.8"
    assert difference(*shown) > 20
    answer = client.images.edit(extra_body={"seed": 7, "strength": 0.8}, **shared)
    whole = expected(engine, **settings)
    assert [difference(opened(each.b64_json), made) <= 1 for each, made in zip(answer.data, whole, strict=True)]
    assert difference(whole[0], inpainted[0]) > 20
    assert generate.sample_student._cache_size() == programs


def test_images_in_a_batch_are_those_made_alone(client, address, gate):
    before = figures(address)
    with ThreadPoolExecutor(4) as pool:
        pool.submit(edit, client, PHOTOS[0])
        gate.wait_for(0)  # in a batch of its own
        prompts = ["a red circle", "a green ring", "a blue circle"]
        together = [pool.submit(edit, client, *pair) for pair in zip(PHOTOS[:2], prompts[:2], strict=True)]
        gate.wait_for(2)
        other = pool.submit(edit, client, PHOTOS[2], prompts[2], strength=0.9)
        gate.wait_for(3)
        gate.open()
        made = [future.result() for future in [*together, other]]
    after = figures(address)
    assert after["arcflow_batch_images_count"] - before["arcflow_batch_images_count"] == 3  # 1 + 2 + 1
    for image, photo, prompt, more in zip(made, PHOTOS, prompts, [{}, {}, {"strength": 0.9}], strict=True):
        assert difference(image, edit(client, photo, prompt, **more)) <= 1
    assert [image.info["strength"] for image in made] == ["0.6", "0.6", "0.9"]


def test_other_formats(client, engine):
    """A lossless WebP, and a JPEG that lies on its side, as cameras write them."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° to the right
    photo = PHOTOS[1]
    jpeg = file(photo.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=100, subsampling=0)
    for data in (file(photo, "WEBP", lossless=True), jpeg):
        answer = client.images.edit(image=[data], prompt=PROMPT, extra_body={"strength": 0.01, "seed": 0})
        assert opened(answer.data[0].b64_json).size == (64, 32)
        start = Image.open(io.BytesIO(data)) if data != jpeg else photo
        (made,) = expected(engine, image=start, strength=0.01, seed=0)
        assert difference(opened(answer.data[0].b64_json), made) <= (8 if data == jpeg else 1)


# --- wrong requests ---


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says that it has this size, and has no pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"0"))]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def no_type(**headers: str) -> httpx.Request:
    return httpx.Request("POST", f"http://test{EDITS}", content=b"--x--", headers=headers)


BAD = {
    "no image": (form({"mask": mask()}), "missing image"),
    "no file": (form({"mask": mask()}, image="photo.png"), "image is a text"),
    "an empty file": (form({"image": b""}), "image cannot be read"),
    "half a file": (form({"image": PHOTO[: len(PHOTO) // 2]}), "image cannot be read"),
    "a GIF": (form({"image": file(PHOTOS[0], "GIF")}), "PNG, JPEG, WEBP"),
    "a bomb": (form({"image": png_of_size(60_000, 60_000)}), "with at most 16384 pixels"),
    "too many pixels": (form({"image": png_of_size(512, 512)}), "with at most 16384 pixels"),
    "another size": (form({"image": file(PHOTOS[0].resize((48, 32)))}), "size 48x32 in 2 steps is not served"),
    "an odd size": (form({"image": file(PHOTOS[0].resize((65, 33)))}), "multiples of 16"),
    "size differs": (form(size="32x64"), "size is 32x64, but image has 64x32"),
    "a mask of another size": (form({"image": PHOTO, "mask": mask(ALPHA.T)}), "mask is 32x64"),
    "an opaque mask": (form({"image": PHOTO, "mask": PHOTO}), "nowhere fully transparent"),
    "a mask that is no image": (form({"image": PHOTO, "mask": b"mask"}), "mask cannot be read"),
    "two images": (form({"image": PHOTO, "image[]": PHOTO}), "image is there twice"),
    "another file": (form({"image": PHOTO, "mask": mask(), "more": PHOTO}), "unknown more"),
    "many files": (form({f"image{i}": PHOTO for i in range(18)}), "Too many files"),
    "a file as text": (form({"image": PHOTO, "prompt": PHOTO}), "prompt is there twice"),
    "an empty prompt": (form(prompt=" "), "prompt is empty"),
    "n": (form(n="1.5"), "n is 1.5"),
    "many": (form(n="5"), "n is 5, but may be at most 4"),
    "a text as n": (form(n="two"), "n is 'two'"),
    "no strength": (form(strength="0"), "strength is 0"),
    "too strong": (form(strength="1.5"), "strength is 1.5"),
    "NaN": (form(strength="NaN"), "strength is 'NaN'"),
    "an unknown field": (form(strenght="1"), "did you mean strength?"),
    "a LoRA that is not there": (form(**{"loras[mist]": "1"}), "loras: mist is not loaded, only grain"),
    "a text as a LoRA's strength": (form(**{"loras[grain]": "x"}), "loras.grain is 'x'"),
    "LoRAs as a text and one by one": (form(loras="grain", **{"loras[grain]": "1"}), "loras[grain] is there twice"),
    "a LoRA with the name of a file": (form(**{"loras[mask]": "1"}), "loras: mask is not loaded, only grain"),
    "a file as a LoRA's strength": (form({"image": PHOTO, "loras[image]": PHOTO}), "loras.image is b"),
    "stream": (form(stream="true"), "stream"),
    "JSON": (no_type(**{"Content-Type": "application/json"}), "multipart/form-data"),
    "no boundary": (no_type(**{"Content-Type": "multipart/form-data"}), "boundary"),
    "no form": (no_type(**{"Content-Type": "multipart/form-data; boundary=y"}), "Invalid multipart"),
    "another encoding": (no_type(**{"Content-Type": "multipart/form-data; boundary=x; charset=punycode"}), "UTF-8"),
}


@pytest.mark.parametrize(("request_", "message"), BAD.values(), ids=BAD)
def test_malformed_forms(door, request_, message):
    (answer,) = asked(door, request_)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert "0x" not in error["message"]
    assert "secret-folder" not in answer.text


def test_other_refusals(door, engine):
    (answer,) = asked(door, form({"image": b"x" * (LIMITS.upload + 1)}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    # A page of another site can send a form without asking; its own page may
    answers = asked(door, *[form(origin=origin, n="9") for origin in ("http://evil.example", "null", "http://test")])
    assert [answer.status_code for answer in answers] == [403, 403, 400]
    (answer,) = asked(door, form(model="dall-e-2"))
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


def test_edits_have_to_be_asked_for(engine):
    plain = declared(engine.pipeline, [(64, 32)], [])
    shared = {"batch_size": 4, "wait": 0.0, "capacity": 4, "declared": plain, "metrics": Metrics(4)}
    refusing, compiling = (Engine([engine.pipeline], on_request=each, **shared) for each in (False, True))
    answers = [
        asked(api.Door(api.build(each, limits=LIMITS, images=images.Images(60)), None, Metrics(4)), form())[0]
        for each in (refusing, compiling)
    ]
    assert answers[0].status_code == 400
    assert "arcflow serve --edits" in answers[0].json()["error"]["message"]
    assert answers[1].status_code == 503  # it was not started


# --- style LoRAs ---


def test_loras(client, engine, address, gate):
    programs = generate.sample_student._cache_size()

    def made(**more: object) -> Image.Image:
        return opened(client.images.generate(prompt=PROMPT, extra_body={"seed": 7} | more).data[0].b64_json)

    before = figures(address)
    with ThreadPoolExecutor(3) as pool:
        plain = pool.submit(made)
        gate.wait_for(0)
        styled = [pool.submit(made, loras={"grain": strength}) for strength in (1.5, 0.5)]
        gate.wait_for(2)
        gate.open()
        plain, strong, weak = (future.result() for future in [plain, *styled])
    after = figures(address)
    assert after["arcflow_batch_images_count"] - before["arcflow_batch_images_count"] == 3  # one for each strength
    assert [image.info.get("loras") for image in (plain, strong, weak)] == [None, "grain:1.5", "grain:0.5"]
    assert "secret-folder" not in str(strong.info)
    assert difference(strong, plain) > difference(weak, plain) > 1
    assert difference(strong, made(loras={"grain": 1.5})) == 0
    # The pipeline now has what the last batch had
    assert difference(strong, expected(engine, seed=7, height=32, width=64)[0]) <= 1
    photo = edit(client, PHOTOS[0], loras={"grain": 1.5})  # a form
    assert photo.info["loras"] == "grain:1.5"
    assert difference(photo, edit(client, PHOTOS[0], loras={"grain": 0})) > 1
    assert difference(made(loras={}), plain) == difference(made(), plain) == 0
    assert generate.sample_student._cache_size() == programs
    assert client.models.retrieve("student").loras == {"grain": 0}


def test_a_lora_that_is_not_loaded(door, client):
    (answer,) = asked(door, post({"prompt": "x", "loras": {"mist": 1}}))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "loras")
    with pytest.raises(openai.BadRequestError, match="only grain"):
        client.images.generate(prompt="x", extra_body={"loras": {"../secret": 1}})
