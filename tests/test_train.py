"""Distillation end to end on the bundled teacher: resume, devices, and what a run refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from arcflow_jax.checkpoint import Checkpoints
from arcflow_jax.config import Recipe, read_config
from arcflow_jax.conversion import convert_model
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.pipeline import ArcFlowPipeline, sample
from arcflow_jax.train import train

CONFIGS = Path(__file__).parents[1] / "configs"
PROMPTS = ["a red circle", "a green square", "a blue ring on the left", "a large yellow triangle"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return convert_model(ASSETS / "tiny-flux", tmp_path_factory.mktemp("model") / "teacher")


def recipe(model: Path, out: Path, **changes) -> Recipe:
    """The tiny recipe, cut down."""
    config = read_config(str(CONFIGS / "tiny.py"))
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    with config.unlocked():
        config.update(model=str(model), prompts=str(prompts), out=str(out), resolutions=((32, 32),), batch=8, steps=4)
        config.update(log_every=1, save_every=2, mesh=(1, 1, 1, 1), preview_every=0)
        config.adapter.update(modes=3, rank=2, dropout=0.1)
        config.distillation.update(decay=3, states=2)
        config.update(changes)
    return Recipe.of(config)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def saved(run: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint."""
    with Checkpoints(run) as checkpoints:
        restored = checkpoints.manager.restore(checkpoints.latest)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(restored)}


def test_interrupted_run_goes_on_bit_for_bit(model, tmp_path):
    straight = train(recipe(model, tmp_path / "straight"))
    train(recipe(model, tmp_path / "resumed", steps=2))
    resumed = train(recipe(model, tmp_path / "resumed"))
    assert losses(straight) == losses(resumed)
    assert all(np.isfinite(losses(straight)))
    one, two = saved(straight), saved(resumed)
    assert one.keys() == two.keys()
    assert sum("ema" in name for name in one) > 10
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)

    # what it left can be sampled from, and only with its own base
    pipeline = ArcFlowPipeline.from_pretrained(model, adapter=straight)
    images = pipeline(PROMPTS[:2], height=32, width=48, seed=3)
    assert [image.size for image in images] == [(48, 32)] * 2
    compiled = sample._cache_size()
    others = pipeline(PROMPTS[2:], height=32, width=48, seed=4, guidance=1.5)
    assert sample._cache_size() == compiled  # nothing of a request is in the program
    assert np.any(np.asarray(others[0]) != np.asarray(images[0]))


def test_run_of_other_settings_is_refused(model, tmp_path):
    train(recipe(model, tmp_path / "run", steps=0))
    changed = recipe(model, tmp_path / "run", guidance=9.0)
    with pytest.raises(UserError, match="holds a run of other settings"):
        train(changed)


def test_adapter_refuses_another_base(model, tmp_path):
    run = train(recipe(model, tmp_path / "run", steps=0))
    description = json.loads((run / "adapter.json").read_text())
    (run / "adapter.json").write_text(json.dumps({**description, "base": "0" * 64}))
    with pytest.raises(UserError, match="was trained on base 000000000000…, this model is"):
        ArcFlowPipeline.from_pretrained(model, adapter=run)


def test_mesh_of_another_size_is_refused(model, tmp_path):
    uneven = dataclasses.replace(recipe(model, tmp_path / "run"), mesh=(2, 1, 1, 1))
    with pytest.raises(
        UserError, match="mesh data 2 × fsdp 1 × tensor 1 × sequence 1 does not have the size of 1 devices"
    ):
        train(uneven)


def test_eight_devices_train_as_one(model, tmp_path):
    """Data parallel, sharded and tensor parallel, in a process that has eight CPU devices."""
    one = train(recipe(model, tmp_path / "one"))
    script = (
        "import sys, dataclasses; from pathlib import Path; from test_train import UserError, recipe, train\n"
        "model, out = map(Path, sys.argv[1:])\n"
        "try: train(recipe(model, out, mesh=(2, 4, 1, 1), batch=12))\n"
        "except UserError as error: assert 'batch 12 does not divide by data × fsdp = 8' in str(error)\n"
        "else: raise AssertionError('an uneven batch was taken')\n"
        "train(recipe(model, out, mesh=(2, 2, 2, 1)))\n"
    )
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(CONFIGS.parent), str(Path(__file__).parent)]),
    }
    out = tmp_path / "eight"
    subprocess.run([sys.executable, "-c", script, str(model), str(out)], env=env, check=True, timeout=300)
    np.testing.assert_allclose(losses(out), losses(one), rtol=1e-4)
