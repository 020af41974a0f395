"""The comparison of methods, run in small: interrupted and resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from arcflow_jax.errors import Preempted
from arcflow_jax.training.recipe import Recipe
from benchmarks.methods import plan, protocol, report, search, study
from benchmarks.methods.protocol import Cell, Setting
from benchmarks.methods.study import Study

CELL = Cell("legendre-4", 1, 3.2)
SETTING = Setting(1e-3, 32, "never")
STOPS = (1 / 2, 1.0)


def small(*arguments: object, **options: bool) -> Recipe:
    """The protocol's recipe, of students that train in a moment."""
    recipe = protocol.recipe(*arguments, **options)
    adapter = dataclasses.replace(recipe.adapter, rank=2)
    values = {"resolutions": ((32, 32),), "batch": 2, "mesh": (1, 1, 1, 1)}
    return dataclasses.replace(recipe, adapter=adapter, **values)


@pytest.mark.slow
def test_an_interrupted_study_resumes(tmp_path, monkeypatch, capsys):
    """One setting and one seed: nothing is done twice, and figures are those of a run without an interruption."""
    monkeypatch.setattr(study, "recipe", small)
    monkeypatch.setattr(study, "SEEDS", (1,))
    monkeypatch.setattr(study, "SCHEDULES", ("never",))
    monkeypatch.setattr(search, "neighbours", lambda setting: [])
    monkeypatch.setattr(search, "grid", lambda: [SETTING])
    monkeypatch.setattr(search, "FIRST", 1.0)
    scope = protocol.Scope(1024, {(1, 3.2): ("legendre-4",)}, published=())
    monkeypatch.setattr(study, "SCOPES", {"tiny-flux": scope})
    for module in (protocol, plan):
        monkeypatch.setattr(module, "STOPS", STOPS)
    for name, value in (("EULER", (2, 50)), ("DIVERSE", 1), ("TRACED", 2)):
        monkeypatch.setattr(f"benchmarks.methods.trial.{name}", value)

    def begun() -> Study:
        return Study("tiny-flux", tmp_path / "out", tmp_path / "results", calls=1024, prompts=4)

    def train_some(recipe: Recipe, steps: int, console: Path) -> None:
        """The second run ends half-way."""
        done.append((recipe.seed, steps))
        if len(done) == 2:
            trained(recipe, steps // 2, console)
            raise Preempted("preempted")
        trained(recipe, steps, console)

    done: list[tuple[int, int]] = []
    trained = study.train_to
    monkeypatch.setattr(study, "train_to", train_some)
    with pytest.raises(Preempted):
        begun().run([(1, 3.2)], ["legendre-4"])
    assert not (tmp_path / "out" / "tiny-flux" / "runs" / "legendre-4-nfe-1-shift-3.2" / "search").exists()

    begun().run([(1, 3.2)], ["legendre-4"])
    assert done == [(0, 8), (1, 8), (1, 8), (1, 8)]
    assert "resumes after training step 4" in (tmp_path / "out" / "tiny-flux" / "train.log").read_text()
    assert "search, rate 0.001, batch 32, schedule never, seed 0, up to 1 of the budget" in capsys.readouterr().out
    found = begun().results
    assert [(r.part, r.share) for r in found if r.part in ("best", "search")] == [
        (part, share) for part in ("search", "best") for share in STOPS
    ]
    dense = {r.nfe: r.figures for r in found if r.part == "teacher"}
    assert dense[2]["endpoint_error"] > dense[50]["endpoint_error"] == 0
    assert dense[50]["diversity"] == 1
    best = [r for r in found if r.part == "best"]
    assert len({r.error for r in best}) == len(STOPS)
    (segments,) = [r.figures["segments"] for r in best if "segments" in r.figures]
    assert [segment["sigma"] for segment in segments] == [[1.0, 0.0]]
    assert segments[0]["state"]["drift"] == pytest.approx(0, abs=1e-12)  # there is no segment before
    schedules = [r for r in found if r.part == "schedules"]
    assert [r.error for r in schedules] == [r.error for r in best]  # the same run, without an interruption
    assert all("segments" in r.figures for r in schedules)

    # Nothing is left to do
    again = begun()
    again.run([(1, 3.2)], ["legendre-4"])
    assert len(done) == 4
    report.write(again.files.folder, again.results)
