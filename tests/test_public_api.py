"""What `import arcflow_jax` offers, and the program of docs/embed.md."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import arcflow_jax
from tests.helpers.paths import ROOT
from tests.helpers.random_student import write_adapter


def test_every_name_resolves_and_is_listed():
    assert len(arcflow_jax.__all__) == len(set(arcflow_jax.__all__)) > 10
    for name in arcflow_jax.__all__:
        value = getattr(arcflow_jax, name)
        assert name == "__version__" or value.__module__.startswith("arcflow_jax.")
        assert name in dir(arcflow_jax)
    assert arcflow_jax.__version__ == importlib.metadata.version("arcflow_jax")


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'Pipeline'"):
        _ = arcflow_jax.Pipeline


def test_import_is_light():
    script = """
import sys, arcflow_jax
heavy = {"jax", "flax", "numpy", "transformers"}
print(heavy & sys.modules.keys())
arcflow_jax.sample
print(heavy & sys.modules.keys() >= {"jax"})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\nTrue\n"


def test_typed():
    assert (Path(arcflow_jax.__file__).parent / "py.typed").is_file()


def test_sampler_inside_another_program(tiny_flux, tmp_path, monkeypatch):
    """The program of docs/embed.md, with a tiny model in place of its own, makes what the pipeline makes."""
    model = shutil.copytree(tiny_flux, tmp_path / "checkpoints" / "flux")
    (tmp_path / "runs").mkdir()
    write_adapter(model, tmp_path / "runs" / "flux", seed=0)
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "embed.md").read_text(), re.DOTALL)
    program = program.replace("1024", "64").replace("shift=3.2", "shift=1.0")  # as this student was trained
    names: dict = {}
    exec(program, names)
    pipe = names["pipe"]
    expected = pipe(["a red fox in the snow"], guidance_scale=3.5, output_type="latent").images
    assert names["latents"].shape == expected.shape == (1, 16, 16)
    np.testing.assert_allclose(names["latents"], expected, atol=1e-5 * np.abs(expected).max())
    assert names["pixels"].shape == (1, 64, 64, 3)
