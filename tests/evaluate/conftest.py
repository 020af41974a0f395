"""Small random networks that judge images, saved as the real ones are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import tiny_judges


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP model with the bundled tokenizer."""
    return tiny_judges.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def dino(tmp_path_factory) -> Path:
    """A tiny DINOv2 model."""
    return tiny_judges.dino(tmp_path_factory.mktemp("dino"))
