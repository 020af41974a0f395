"""EMA weights and optimizer state in host memory: the run is the same, and they are there between training steps."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest

from arcflow_jax.errors import UserError
from arcflow_jax.parallel.offload import HOST
from arcflow_jax.training import loop
from arcflow_jax.training.recipe import Recipe, read_config
from arcflow_jax.training.report import dry_run
from tests.helpers.tiny_run import recipe, saved

OFF = "--config.offload_optimizer="


@pytest.mark.slow
def test_the_run_is_the_same_and_resumes(tiny_flux, tmp_path, monkeypatch):
    """Bit by bit after a resume; to rounding with all on the device, because that step is compiled as one program."""
    kinds = []
    save = loop.Checkpoints.save

    def watched(self, step, items):
        kinds.append({name: memory(items[name]) for name in ("adapter", "ema", "optimizer")})
        save(self, step, items)

    device = saved(loop.train(recipe(tiny_flux, tmp_path / "device")))
    monkeypatch.setattr(loop.Checkpoints, "save", watched)
    straight, resumed = (recipe(tiny_flux, tmp_path / name, offload_optimizer=True) for name in ("straight", "resumed"))
    host = saved(loop.train(straight))
    loop.train(dataclasses.replace(resumed, steps=2))
    again = saved(loop.train(resumed))
    assert kinds
    assert all(found == {"adapter": {"device"}, "ema": {HOST}, "optimizer": {HOST}} for found in kinds)
    for name, array in device.items():
        np.testing.assert_array_equal(again[name], host[name], err_msg=name)
        if "checksum" not in name:  # Adam divides by the gradient's size, also where that is rounding
            assert np.linalg.norm(host[name] - array) <= 1e-2 * np.linalg.norm(array), name


def memory(tree: object) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def test_a_dry_run_tells_what_leaves_the_device(tiny_flux, tmp_path):
    text = dry_run.report(recipe(tiny_flux, tmp_path / "run", offload_optimizer=True, adapter={"rank": 64}))
    gib = {name: float(size) for name, size in re.findall(r"^  (\S.*\S) +([\d.]+) GiB$", text, re.M)}
    away = gib["of that, in host memory except during the update"]
    assert away == pytest.approx(gib["EMA weights"] + gib["optimizer"], abs=0.0015)
    assert away > 0


@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("false", False), ("False", False)])
def test_the_setting_is_true_or_false(text, value):
    assert Recipe.from_config(read_config("tiny", [OFF + text])).offload_optimizer is value


def test_another_setting_is_refused():
    with pytest.raises(UserError, match=r"--config.offload_optimizer is 1, but has to be true or false"):
        read_config("tiny", [f"{OFF}1"])
