"""The page in a real browser: a headless Chromium that the machine has."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright import sync_api as playwright

from arcflow_jax.serve import api, page
from arcflow_jax.serve.images import Images
from tests.serve.conftest import LIMITS, served, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
PROMPT = "a red circle on the left"


@pytest.fixture(scope="module")
def site(engine) -> Iterator[str]:
    """The address of the page. The student itself stands for the teacher: what it shows is the same."""
    images = Images(60)
    app = page.mount(
        api.build(engine, limits=LIMITS, images=images), engine, teacher=engine, limits=LIMITS, images=images
    )
    with served(api.Door(app, None, engine.metrics)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, site) -> Iterator:
    asked = []
    tab = browser.new_page(viewport={"width": 1300, "height": 900})
    tab.on("request", lambda request: asked.append(request.url))
    tab.set_default_timeout(30_000)
    tab.goto(site)
    tab.get_by_label("Prompt").wait_for()
    yield tab
    tab.close()
    # Nothing that the user sees comes from another server, and nobody else learns of it
    foreign = {url for url in asked if not url.startswith((site, "data:", "blob:"))}
    assert all("iframe-resizer" in url or "cdnjs" in url for url in foreign), foreign


def shows(tab, site: str, prompt: str) -> bool:
    """Whether the page shows the image of a prompt."""
    return bool(tab.locator(".arcflow.large img").count()) and shown(tab, site).info["prompt"] == prompt


def shown(tab, site: str) -> Image.Image:
    """The image that the page shows."""
    link = tab.locator(".arcflow.large img").first.get_attribute("src")
    return Image.open(io.BytesIO(httpx.get(f"{site}/{link}").content))


def changed(tab, before: str | None) -> str:
    """The link of the image, once it is another."""
    tab.wait_for_function(
        "old => { const i = document.querySelector('.arcflow.large img'); return i && i.getAttribute('src') != old }",
        arg=before,
    )
    return tab.locator(".arcflow.large img").first.get_attribute("src")


def test_the_image_follows_the_text(tab, site, engine):
    prompt = tab.get_by_label("Prompt")
    prompt.press_sequentially(PROMPT, delay=5)
    # The latest text wins, however many were skipped
    wait_until(lambda: shows(tab, site, PROMPT), 30)
    image = shown(tab, site)
    alone = engine.pipeline(PROMPT, seed=0, height=32, width=64).images[0]
    assert np.abs(np.asarray(image, np.int32) - np.asarray(alone, np.int32)).max() <= 1
    first = changed(tab, None)
    tab.get_by_role("button", name="Another seed").click()
    changed(tab, first)
    wait_until(lambda: shown(tab, site).info["seed"] == tab.get_by_label("Seed", exact=True).input_value(), 30)
    assert shown(tab, site).info["seed"] != "0"

    tab.get_by_role("button", name="Keep").click()
    tab.locator(".arcflow.small img").wait_for()
    tab.get_by_role("button", name="Compare").click()
    tab.wait_for_function("document.querySelectorAll('.arcflow.large img').length == 2")
    assert all(" s" in text for text in tab.locator(".arcflow.large figcaption").all_inner_texts())

    tab.reload()
    prompt.wait_for()
    assert tab.locator(".arcflow.large img").count() == 0
    prompt.press_sequentially("a blue ring")
    wait_until(
        lambda: tab.locator(".arcflow.large img").count() and shown(tab, site).info["prompt"] == "a blue ring", 30
    )


def test_an_error_is_shown(tab):
    tab.get_by_label("Prompt").fill("<b>" * LIMITS.prompt)
    tab.locator(".error").wait_for()
    assert "but may be at most 200" in tab.locator(".error").inner_text()


def test_settings_of_a_png_are_read_back(tab, site, engine, tmp_path):
    (future,) = engine.submit("a large green ring", engine.declared[0], 77)
    file = tmp_path / "image.png"
    file.write_bytes(future.result())
    tab.locator("input[type=file]").first.set_input_files(file)
    wait_until(lambda: shows(tab, site, "a large green ring"), 30)
    assert tab.get_by_label("Prompt").input_value() == "a large green ring"
    assert tab.get_by_label("Seed", exact=True).input_value() == "77"
    assert np.array_equal(np.asarray(shown(tab, site)), np.asarray(Image.open(file)))


@pytest.mark.parametrize("width", [1300, 400])
def test_it_fits_the_window(tab, width):
    tab.set_viewport_size({"width": width, "height": 900})
    tab.get_by_label("Prompt").fill(PROMPT)
    changed(tab, None)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    if folder := os.environ.get("ARCFLOW_SCREENSHOTS"):
        tab.screenshot(path=Path(folder) / f"page-{width}.png")
