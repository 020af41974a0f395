"""The benchmarks compare equal things: a training step with optimizer against its PyTorch twin; and a model that was
never on the disk as a whole against the same model that was. And every script starts."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from arcflow_jax.models.conversion import convert_model
from arcflow_jax.storage.safetensors import read_header
from benchmarks.convert_full_size import Values, run
from benchmarks.train_step import Size, ours, theirs

ROOT = Path(__file__).parents[2]

TINY = Size(heads=2, head_dim=16, double=1, single=1, modes=3, rank=2, batch=2, rows=2, text=3)


@pytest.mark.parametrize("decay", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_train_step_matches_pytorch(decay, tmp_path):
    """Three training steps: led by the teacher, by both and by the student; or all in the steady phase."""
    for package in ("torch", "peft", "diffusers"):
        pytest.importorskip(package)
    mine = list(ours(TINY, decay, 3, tmp_path))
    other = list(theirs(TINY, decay, 3, tmp_path))
    np.testing.assert_allclose(mine, other, rtol=1e-4)
    assert len(set(mine)) == 3


def fingerprints(model: Path) -> dict[str, str]:
    components = json.loads((model / "model.json").read_text())["components"]
    return {name: component["fingerprint"] for name, component in components.items()}


@pytest.mark.skipif(shutil.which("fallocate") is None, reason="needs util-linux's fallocate")
def test_source_written_as_it_is_read_converts_the_same(tmp_path, capfd):
    sizes = {
        "transformer": {"num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64},
        "text_encoder": {"num_hidden_layers": 1, "vocab_size": 999, "hidden_size": 64, "intermediate_size": 96},
        "vae": {"base_dim": 8},
    }
    sizes["text_encoder"] |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    changes = [f"{name}.{key}={value}" for name, config in sizes.items() for key, value in config.items()]
    settings = {"model": ROOT / "configs" / "qwen-image", "set": changes, "shard_gb": 1e-3, "original": False}
    run(argparse.Namespace(folder=tmp_path, as_it_goes=True, **settings))
    assert "peak resident memory" in capfd.readouterr().out

    source = tmp_path / "source"
    files = sorted(source.rglob("*.safetensors"))
    assert len(files) > 5
    size, taken = (sum(f(os.stat(file)) for file in files) for f in (lambda s: s.st_size, lambda s: 512 * s.st_blocks))
    assert taken < size / 4  # the rest is blocks that small tensors share
    values = Values()
    for tensor in (tensor for file in files for tensor in read_header(file).values()):
        values.write(tensor)
    assert fingerprints(convert_model(source, tmp_path / "again")) == fingerprints(tmp_path / "converted")


SCRIPTS = [path.stem for path in (ROOT / "benchmarks").glob("*.py") if '"__main__"' in path.read_text()] + ["methods"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_script_starts(script, monkeypatch, capsys):
    if script == "block_ratio":
        pytest.importorskip("diffusers")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{script}", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")
