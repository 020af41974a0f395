"""The page in a headless Chromium that the machine has."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright import sync_api as playwright

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
NEEDED = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="there is no chromium on this machine")]


@contextlib.contextmanager
def started() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=PROGRAM, args=list(FLAGS))
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: playwright.Browser, site: str) -> Iterator[playwright.Page]:
    """A page; nothing that its user sees comes from another server, and nobody else learns of it."""
    asked = []
    tab = browser.new_page(viewport={"width": 1300, "height": 900})
    tab.on("request", lambda request: asked.append(request.url))
    tab.set_default_timeout(30_000)
    tab.goto(site)
    tab.get_by_label("Prompt").wait_for()
    yield tab
    tab.close()
    foreign = {url for url in asked if not url.startswith((site, "data:", "blob:"))}
    assert all("iframe-resizer" in url or "cdnjs" in url for url in foreign), foreign


def shown(tab: playwright.Page, site: str) -> Image.Image:
    """The image that the page shows."""
    link = tab.locator(".arcflow.large img").first.get_attribute("src")
    return Image.open(io.BytesIO(httpx.get(f"{site}/{link}").content))


def shows(tab: playwright.Page, site: str, prompt: str, **settings: str) -> bool:
    """Whether the page shows the image of a prompt, with these settings."""
    if not tab.locator(".arcflow.large img").count():
        return False
    return ({"prompt": prompt} | settings).items() <= shown(tab, site).info.items()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.int32)


def drop(tab: playwright.Page, label: str, *files: Path) -> None:
    """Gives files to the place of that name."""
    block = tab.locator(".block", has_text=label).filter(has=tab.locator("input[type=file]")).last
    block.locator("input[type=file]").set_input_files(files if len(files) > 1 else files[0])
