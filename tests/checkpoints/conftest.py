"""The authors' tiny teacher and student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from arcflow_jax.models.conversion import convert_model
from tests.helpers.paths import GOLDEN
from tests.helpers.source_folder import weights_file, write_source
from tests.helpers.students import RELEASED


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A converted model around the authors' tiny teacher."""
    folder = tmp_path_factory.mktemp("base")
    write_source(folder / "source")
    config = json.loads((RELEASED / "config.json").read_text()) | {"_class_name": "FluxTransformer2DModel"}
    (folder / "source" / "transformer" / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "flux_tiny_teacher.safetensors", weights_file(folder / "source", "transformer"))
    return convert_model(folder / "source", folder / "model")


@pytest.fixture
def released(tmp_path) -> Path:
    """The authors' student, in a folder that a test may damage."""
    return shutil.copytree(RELEASED, tmp_path / "released")
