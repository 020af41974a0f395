"""Reference images, of a tiny FLUX.2 [klein]: OpenAI's client, a batch of two clients, wrong forms, the page."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import openai
import pytest
from PIL import Image, ImageOps

from arcflow_jax.families import flux2
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.serve import api
from arcflow_jax.serve.engine import Engine
from arcflow_jax.serve.images import Images
from arcflow_jax.serve.metrics import Metrics
from arcflow_jax.serve.settings import declared
from tests.helpers import random_student
from tests.helpers.tiny_flux2 import make_tiny_flux2
from tests.serve.asking import EDITS, asked, difference, file, opened
from tests.serve.conftest import LIMITS, served, wait_until

RNG = np.random.default_rng(0)
PHOTOS = [
    Image.fromarray(RNG.integers(0, 256, (9, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    for size in ((64, 72), (90, 66), (80, 64))
]
PROMPT = "put the ring onto the square"


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    """Serves one and two reference images, and inpainting."""
    source = make_tiny_flux2(tmp_path_factory.mktemp("flux2") / "source")
    model = convert_model(source, source.with_name("model"))
    adapter = dataclasses.replace(random_student.ADAPTER, targets=flux2.FAMILY.lora_targets)
    run = random_student.write_adapter(model, source.with_name("student"), 0, adapter)
    pipe = ArcFlowPipeline.from_pretrained(model, run)
    kinds = declared(pipe, [(64, 64)], [], edits=True)
    assert [(each.strength, each.masked, each.references) for each in kinds] == [
        *((None, False, 0), (0.6, False, 0), (0.6, True, 0)),
        *((None, False, count) for count in (1, 2, 3, 4)),
    ]
    kinds = [kind for kind in kinds if kind.masked or kind.references in (1, 2)]
    engine = Engine([pipe], batch_size=2, wait=0.5, capacity=6, declared=kinds, on_request=False, metrics=Metrics(2))
    engine.start()
    yield engine
    engine.stop()


def fitted(image: Image.Image) -> Image.Image:
    return ImageOps.fit(image, (64, 64), Image.Resampling.LANCZOS)


@pytest.mark.slow
def test_reference_images(engine, monkeypatch):
    door = api.Door(api.build(engine, limits=LIMITS, images=Images(60)), None, engine.metrics)
    sets, read = [PHOTOS[:2], [PHOTOS[2], PHOTOS[0]]], []
    begin = engine.pipeline.begin

    def recorded(prompts: list[str], noise: jax.Array, **named: Any) -> Iterator[Image.Image]:
        read.extend(named["image"] if "strength" not in named or named["strength"] is None else [])
        return begin(prompts, noise, **named)

    with served(door) as address, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(engine.pipeline, "begin", recorded)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def edit(images: list[Image.Image], **more: object) -> Image.Image:
            sent = [file(image) for image in images]
            answer = client.images.edit(image=sent, prompt=PROMPT, extra_body={"seed": 3}, **more)
            return opened(answer.data[0].b64_json)

        alone = edit(PHOTOS[:1])
        both = list(pool.map(edit, sets))
        mask = np.dstack([np.zeros((64, 64, 3), np.uint8), np.repeat([[0], [255]], 32, 0).repeat(64, 1)])
        kept = edit([fitted(PHOTOS[0])], mask=file(Image.fromarray(mask.astype(np.uint8))))
    size = {"height": 64, "width": 64, "seed": 3, "batch_size": 2}
    for made, images in zip([alone, *both], [PHOTOS[:1], *sets], strict=True):
        (expected,) = engine.pipeline.stream(PROMPT, image=[fitted(image) for image in images], **size)
        assert difference(made, expected) <= 1
        assert made.info["references"] == str(len(images))
    shown = {np.stack(each).tobytes() for each in read}
    assert shown == {np.stack([np.asarray(fitted(x)) for x in images]).tobytes() for images in [PHOTOS[:1], *sets]}
    np.testing.assert_array_equal(np.asarray(kept)[32:], np.asarray(fitted(PHOTOS[0]))[32:])

    def refused(count: int, **fields: str) -> str:
        sent = [("image[]", ("photo.png", file(fitted(PHOTOS[0])))) for _ in range(count)]
        request = httpx.Request("POST", f"http://test{EDITS}", data={"prompt": "x"} | fields, files=sent)
        (answer,) = asked(door, request)
        assert answer.status_code == 400
        return answer.json()["error"]["message"]

    assert refused(5) == "image is there 5 times, but may be there 4 times"
    assert refused(2, strength="0.5") == "image is there twice, but may be there once"
    assert refused(3).startswith("size 64x64 in 2 steps is not served")
    assert refused(1, size="99999x99999").startswith("size is 99999x99999, but may have at most")


@pytest.mark.slow
def test_on_the_page(engine, tmp_path):
    pytest.importorskip("playwright")
    from arcflow_jax.serve import page
    from tests.helpers import chromium

    if chromium.PROGRAM is None:
        pytest.skip("there is no chromium on this machine")
    paths = [tmp_path / f"{number}.png" for number in range(len(PHOTOS))]
    for path, photo in zip(paths, PHOTOS, strict=True):
        photo.save(path)
    images = Images(60)
    app = page.mount(
        api.build(engine, limits=LIMITS, images=images), engine, teacher=None, limits=LIMITS, images=images
    )
    place = "Reference images: drop up to 2 here"

    def expected(photos: list[Image.Image]) -> np.ndarray:
        arguments = {"height": 64, "width": 64, "seed": 0, "batch_size": 1}
        (made,) = engine.pipeline.stream(PROMPT, image=[fitted(photo) for photo in photos], **arguments)
        return chromium.pixels(made)

    with (
        served(api.Door(app, None, engine.metrics)) as site,
        chromium.started() as browser,
        chromium.opened(browser, site) as tab,
    ):
        tab.get_by_role("button", name="Reference images").click()
        chromium.drop(tab, place, *paths[:2])
        tab.get_by_role("img", name="Reference image 2").wait_for()
        tab.get_by_label("Prompt").fill(PROMPT)
        wait_until(lambda: chromium.shows(tab, site, PROMPT, references="2"), 60)
        made = chromium.pixels(chromium.shown(tab, site))
        assert np.abs(made - expected(PHOTOS[:2])).max() <= 1
        if folder := os.environ.get("ARCFLOW_SCREENSHOTS"):
            tab.screenshot(path=Path(folder) / "page-references.png")

        tab.get_by_role("button", name="Remove this file").first.click()
        wait_until(lambda: chromium.shows(tab, site, PROMPT, references="1"), 60)
        made = chromium.pixels(chromium.shown(tab, site))
        assert np.abs(made - expected(PHOTOS[1:2])).max() <= 1

        tab.get_by_role("button", name="Start from an image").click()
        chromium.drop(tab, "Image: drop it here", paths[0])
        tab.get_by_text("It starts from an image or reads reference images, but not both").wait_for()
