"""What an evaluation has written and reads again: damage is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from arcflow_jax.errors import UserError
from arcflow_jax.evaluate.frechet import Moments
from arcflow_jax.evaluate.statistics import Statistics
from arcflow_jax.evaluate.trajectory.report import REPORT, evaluate
from tests.helpers.fake_comparison import FakeComparison

PROMPTS = ["a", "b", "c", "d"]


@pytest.fixture
def report(tmp_path) -> Path:
    evaluate(FakeComparison(2), PROMPTS, tmp_path)
    return tmp_path / REPORT


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda segment: segment["velocity"].update(teacher=True),
            r"json: segments\.0\.velocity\.teacher is True, but has to be a number",
        ),
        (lambda segment: segment["state"].pop("drift"), r"segments\.0\.missing state\.drift"),
        (lambda segment: segment["curves"]["state"].pop("sigma"), r"missing state\.sigma"),
        (
            lambda segment: segment["curves"]["velocity"]["teacher"].pop(),
            r"velocity: .*teacher.* have different lengths",
        ),
        (lambda segment: segment["curves"]["velocity"]["sigma"].append(2), "have different lengths"),
        (
            lambda segment: segment["curves"]["state"]["sigma"].__setitem__(0, 2),
            r"state\.sigma has a number that is not",
        ),
    ],
)
def test_a_damaged_report_is_refused(report, damage, message):
    values = json.loads(report.read_text())
    damage(values["segments"][0])
    report.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        evaluate(FakeComparison(2), PROMPTS, report.parent)


def test_a_report_without_what_may_be_null_is_plotted(report):
    values = json.loads(report.read_text())
    del values["endpoint"]["student"]["standard_error"]
    report.write_text(json.dumps(values))
    found = evaluate(FakeComparison(2), PROMPTS, report.parent)
    assert found["endpoint"]["student"]["standard_error"] is None


def test_statistics_that_lack_a_metric_are_refused(tmp_path):
    """As after a bit that makes zipfile skip the rest of its directory."""
    features = np.random.default_rng(0).standard_normal((8, 3))
    images = {"folder": "x", "count": 8, "files_sha256": "0" * 64}
    description = {"metrics": ["fid"], "inception": "0" * 64, "clip": None, "images": images}
    Statistics(description, {"fid": Moments.from_features(features)}).write(tmp_path / "whole.npz")
    with np.load(tmp_path / "whole.npz") as arrays:
        kept = {name: arrays[name] for name in ("format", "description")}
    np.savez(tmp_path / "cut.npz", **kept)
    assert Statistics.read(tmp_path / "whole.npz").complete
    with pytest.raises(UserError, match=r"cut\.npz is damaged: it lacks the moments of fid"):
        Statistics.read(tmp_path / "cut.npz")
