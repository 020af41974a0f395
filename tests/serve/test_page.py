"""The page in a real browser."""

from __future__ import annotations

import dataclasses
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcflow_jax.serve import api, page
from arcflow_jax.serve.images import Images
from tests.helpers.chromium import NEEDED, drop, opened, pixels, shown, shows, started
from tests.serve.conftest import LIMITS, served, wait_until

pytestmark = NEEDED
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
    with started() as browser:
        yield browser


@pytest.fixture
def tab(browser, site) -> Iterator:
    with opened(browser, site) as tab:
        yield tab


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
    assert np.abs(pixels(image) - pixels(alone)).max() <= 1
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


def test_style_loras_download_and_settings_that_come_back(tab, browser, site, engine, tmp_path):
    """What one browser downloads gives another one all settings again, and the same image."""
    tab.get_by_label("Prompt").fill("a large green ring")
    for name, value in {"Seed": 77, "number input for Guidance": 2.25, "number input for grain": 1.75}.items():
        tab.get_by_label(name, exact=True).fill(str(value))
        tab.get_by_label(name, exact=True).press("Tab")
    wait_until(lambda: shows(tab, site, "a large green ring", seed="77", guidance="2.25", loras="grain:1.75"), 30)
    settings = dataclasses.replace(engine.declared[0], guidance=2.25, loras=(("grain", 1.75),))
    (future,) = engine.submit("a large green ring", settings, 77)
    expected = pixels(Image.open(io.BytesIO(future.result())))
    assert np.abs(pixels(shown(tab, site)) - expected).max() <= 1
    (future,) = engine.submit("a large green ring", dataclasses.replace(settings, loras=()), 77)
    assert np.abs(pixels(Image.open(io.BytesIO(future.result()))) - expected).max() > 5

    with tab.expect_download() as download:
        tab.get_by_role("link", name="download").first.click()
    assert download.value.suggested_filename == "student-seed77.png"
    file = tmp_path / "image.png"
    download.value.save_as(file)
    other = browser.new_page()
    other.goto(site)
    drop(other, "Settings of a PNG", file)
    wait_until(lambda: shows(other, site, "a large green ring", loras="grain:1.75"), 30)
    for name, value in {"Seed": "77", "number input for Guidance": "2.25", "number input for grain": "1.75"}.items():
        assert other.get_by_label(name, exact=True).input_value() == value
    assert shown(other, site).info == Image.open(file).info
    assert np.abs(pixels(shown(other, site)) - expected).max() <= 1
    # Without a style LoRA
    (future,) = engine.submit("a red circle", engine.declared[0], 3)
    file.write_bytes(future.result())
    drop(other, "Settings of a PNG", file)
    wait_until(lambda: shows(other, site, "a red circle", seed="3"), 30)
    assert "loras" not in shown(other, site).info
    other.close()


def test_an_image_to_start_from(tab, site, tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 4, 3), np.uint8)).resize((128, 64))
    photo.save(tmp_path / "photo.png")
    fitted = pixels(photo.resize((64, 32), Image.Resampling.LANCZOS))
    tab.get_by_label("Prompt").fill(PROMPT)
    first = changed(tab, None)
    from_noise = pixels(shown(tab, site))
    tab.get_by_role("button", name="Start from an image").click()
    drop(tab, "Image: drop it here", tmp_path / "photo.png")
    second = changed(tab, first)
    assert shown(tab, site).info["strength"] == "0.6"
    assert np.abs(pixels(shown(tab, site)) - fitted).max() > 20
    tab.get_by_label("number input for Strength").fill("0.9")
    tab.get_by_label("number input for Strength").press("Tab")
    wait_until(lambda: shown(tab, site).info["strength"] == "0.9", 30)

    # A stroke in the middle: around it the photo stays
    canvas = tab.locator("canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x - 40, y)
    tab.mouse.down()
    tab.mouse.move(x + 40, y, steps=4)
    tab.mouse.up()
    wait_until(lambda: np.array_equal(pixels(shown(tab, site))[:8], fitted[:8]), 30)
    differs = np.abs(pixels(shown(tab, site)) - fitted).max(-1)
    assert differs[14:18, 24:40].max() > 20
    assert not differs[:, :8].any()
    assert not differs[:, -8:].any()

    third = changed(tab, second)
    tab.get_by_role("button", name="Clear the mask").click()
    changed(tab, third)
    assert np.abs(pixels(shown(tab, site))[:8] - fitted[:8]).max() > 20
    tab.get_by_role("button", name="Remove the image").click()
    wait_until(lambda: "strength" not in shown(tab, site).info, 30)
    assert np.abs(pixels(shown(tab, site)) - from_noise).max() <= 1

    (tmp_path / "photo.png").write_text("no image")
    drop(tab, "Image: drop it here", tmp_path / "photo.png")
    tab.get_by_text("This image cannot be read. It has to be one of PNG, JPEG, WEBP").wait_for()
    drop(tab, "Settings of a PNG", tmp_path / "photo.png")
    tab.get_by_text("This file has no settings in it").wait_for()


def test_the_latest_text_wins(tab, browser, site, gate):
    """While an image is made, one change waits, the newest; and another browser gets its own."""
    made = len(gate.sizes)
    tab.get_by_label("Prompt").press_sequentially(PROMPT, delay=5)
    gate.wait_for(0)
    tab.wait_for_timeout(300)
    other = browser.new_page()
    other.goto(site)
    other.get_by_label("Prompt").fill("a blue ring")
    gate.wait_for(1)
    gate.open()
    wait_until(lambda: shows(tab, site, PROMPT) and shows(other, site, "a blue ring"), 30)
    assert len(gate.sizes) - made <= 3  # not one for each letter
    other.close()


def test_a_comparison_gives_way_to_newer_text(tab, site, gate):
    prompt = tab.get_by_label("Prompt")
    gate.open()
    prompt.fill(PROMPT)
    changed(tab, None)
    gate.opened.clear()
    entered = len(gate.sizes)
    tab.get_by_role("button", name="Compare").click()
    wait_until(lambda: len(gate.sizes) > entered)
    prompt.fill("a blue ring")
    gate.wait_for(1)
    gate.open()
    wait_until(lambda: shows(tab, site, "a blue ring"), 30)
    tab.wait_for_timeout(500)
    assert tab.locator(".arcflow.large img").count() == 1


def test_errors_are_shown(tab, site, engine, gate, monkeypatch):
    prompt, error = tab.get_by_label("Prompt"), tab.get_by_role("alert")
    prompt.fill("<b>" * LIMITS.prompt)
    error.wait_for()
    assert error.inner_text() == "Prompt is 600 characters long, but may be at most 200"

    held = [*engine.submit("a red circle", engine.declared[0], 1)]
    gate.wait_for(0)
    held += engine.submit("a red circle", engine.declared[0], 1, engine.capacity)
    prompt.fill(PROMPT)
    tab.get_by_text("The queue is full, try again in").wait_for()
    gate.open()
    for future in held:
        future.result()

    def broken(*arguments, **named):
        raise RuntimeError("a path of the server")

    monkeypatch.setattr(engine.pipeline, "begin", broken)
    prompt.fill("a blue ring")
    tab.get_by_text("The server has an error; its log says more").wait_for()
    monkeypatch.setattr(engine.pipeline, "begin", gate)
    prompt.fill("a green ring")
    wait_until(lambda: shows(tab, site, "a green ring"), 30)


def test_every_control_has_a_name(tab, tmp_path):
    """As a screen reader reads them out; and all of them are reached with the keyboard."""
    prompt = tab.get_by_label("Prompt")
    words = 'a "red" <b>ring</b> ${1 + 1} {{x}} `y`'
    prompt.fill(words)
    changed(tab, None)
    prompt.press("Enter")
    tab.locator(".arcflow.small img").wait_for()
    tab.get_by_role("button", name="Start from an image").click()
    Image.new("RGB", (64, 32)).save(tmp_path / "photo.png")
    drop(tab, "Image: drop it here", tmp_path / "photo.png")
    tab.locator("canvas").wait_for()
    read_out = tab.locator("body").aria_snapshot()
    controls = re.findall(r"- (button|textbox|slider|spinbutton|combobox|link)\b(.*)", read_out)
    assert len(controls) >= 15
    assert [control for control in controls if not control[1].startswith(' "')] == []
    assert tab.locator(".arcflow img").evaluate_all("all => all.map(each => each.alt)") == [words] * 2
    assert tab.get_by_role("img", name="Paint what is made anew").count() == 1
    reached = set()
    for _ in range(40):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("(document.activeElement.ariaLabel || document.activeElement.innerText || '').trim()"))
    assert {"download", "Keep", "Compare", "Another seed", "Clear the mask", "Remove the image"} <= reached


@pytest.mark.parametrize("width", [1300, 400])
def test_it_fits_the_window(tab, width):
    tab.set_viewport_size({"width": width, "height": 900})
    tab.get_by_label("Prompt").fill(PROMPT)
    changed(tab, None)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    if folder := os.environ.get("ARCFLOW_SCREENSHOTS"):
        tab.screenshot(path=Path(folder) / f"page-{width}.png")
