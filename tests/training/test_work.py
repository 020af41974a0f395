"""The rates that the log states."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from arcflow_jax.parallel.chips import CHIPS
from arcflow_jax.training import work
from arcflow_jax.training.report.log import RunLog
from arcflow_jax.training.work import speed
from tests.helpers.tiny_run import recipe


def test_the_share_of_the_peak_is_of_known_chips(monkeypatch):
    assert speed(3e12) == {"tflops_per_device": 3 / jax.device_count(), "mfu": None}  # a CPU
    monkeypatch.setattr(work.jax, "devices", lambda: [SimpleNamespace(device_kind=CHIPS["h100"].kinds[0])])
    monkeypatch.setattr(work.jax, "device_count", lambda: 4)
    assert speed(4 * 0.4 * CHIPS["h100"].flops)["mfu"] == pytest.approx(0.4)


def test_the_log_has_rates(tmp_path, tiny_flux):
    run = tmp_path / "run"
    run.mkdir()
    values = {"loss": jnp.float32(1), "segment_loss": jnp.ones(2), "gradient_norm": jnp.float32(1)}
    values |= {"learning_rate": jnp.float32(1), "teacher_share": jnp.float32(1), "skipped": jnp.int32(0)}
    with RunLog(run, recipe(tiny_flux, run), 0) as log:
        for step in (1, 2):
            log.flops += 10**12
            log.step(step, values)
    for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        assert line["examples_per_second"] == pytest.approx(8 * line["steps_per_second"])
        assert line["tflops_per_device"] == pytest.approx(line["steps_per_second"] / jax.device_count())
        assert line["mfu"] is None
