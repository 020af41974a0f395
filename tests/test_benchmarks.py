"""What the benchmarks compare is the same: a whole iteration, optimizer included, against its PyTorch twin."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.train_step import Size, ours, theirs

TINY = Size(heads=2, head_dim=16, double=1, single=1, modes=3, rank=2, batch=2, rows=2, text=3)


@pytest.mark.parametrize("decay", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_train_step_is_that_of_pytorch(decay, tmp_path):
    """Three iterations: led by the teacher, by both, by the student; or all in the steady phase."""
    for package in ("torch", "peft", "diffusers"):
        pytest.importorskip(package)
    mine = list(ours(TINY, decay, 3, tmp_path))
    other = list(theirs(TINY, decay, 3, tmp_path))
    np.testing.assert_allclose(mine, other, rtol=1e-4)
    assert len(set(mine)) == 3
