"""`benchmarks.accelerator`: some rows in small, its table, and that an interrupted run resumes."""

from __future__ import annotations

import json

import pytest

from benchmarks import accelerator
from benchmarks.accelerator_rows import Skipped, rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sampler, int8 blocks in host memory", "token ids to image", "forward"])
def test_rows_run_in_small(name):
    found = rows(tiny=True)[name]()
    assert found["finite"]
    assert found["seconds"] > 0
    assert found["tflops_per_device"] > 0


def test_rows_that_cannot_run_say_why():
    for name in ("splash", "cudnn, backward", "chunked, backward, lengths, all devices"):
        with pytest.raises(Skipped, match=r"no (splash|cudnn) on cpu|one device"):
            rows(tiny=True)[f"attention: {name}"]()


def test_an_interrupted_run_resumes(tmp_path, monkeypatch):
    asked = []

    def row(name: str, tiny: bool) -> dict[str, object]:
        asked.append(name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        if name == "matrix product":
            return {"seconds": 0.5, "tflops_per_device": 100.0, "mfu": None, "finite": True, "device": "GPU"}
        if len(asked) == 2:
            return {"skipped": "one device"}
        return {"seconds": 1.0, "tflops_per_device": 25.0, "finite": False}

    monkeypatch.setattr(accelerator, "row_apart", row)
    with pytest.raises(KeyboardInterrupt):
        accelerator.all_rows(tmp_path, tiny=True)
    first = asked.copy()
    results = accelerator.all_rows(tmp_path, tiny=True)
    assert asked[3:] == list(rows(tiny=True))[2:]  # not the two that were there
    assert list(results["rows"]) == list(rows(tiny=True))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("GPU, jax ")
    assert f"| {first[0]} | 0.5000 | 100.0 | 100 % |  |  |" in lines
    assert f"| {first[1]} |  |  |  |  | skipped one device |" in lines
    assert any(line.endswith("| 1.0000 | 25.0 | 25 % |  | NOT FINITE |") for line in lines)
