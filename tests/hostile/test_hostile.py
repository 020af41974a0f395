"""Some 500 hostile inputs of all families. `python -m tests.hostile --count 10000` runs more of them."""

from __future__ import annotations

import pytest

from tests.hostile import runner
from tests.hostile.families import FAMILIES

COUNT, SEED = 500, 2026


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_hostile_inputs_are_told_or_read_right(family, tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTILE_FOLDER", str(tmp_path))
    jobs = [job for job in runner.plan(list(FAMILIES), COUNT, SEED) if job[0] == family]
    bad = [result for job in jobs if (result := runner.run_one(*job)).bad]
    assert not bad, f"{len(bad)} of {len(jobs)}\n{runner.causes(bad)}"
