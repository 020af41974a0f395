"""The ablation: its cells, how it resumes, its table and figure."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from PIL import Image

from arcflow_jax.errors import UserError
from arcflow_jax.families.flux import FLUX
from arcflow_jax.networks.student import split_model
from arcflow_jax.training.optimizer import make_optimizer
from arcflow_jax.training.recipe import Recipe, read_config
from benchmarks.ablation import report
from benchmarks.ablation.cells import CELLS, COMPARED, METHODS, MODES, cell, modes
from benchmarks.ablation.study import CONFIG, Result, Study, teacher
from configs.tiny_ablation import CHANGES
from tests.helpers.few_steps import FLUX_CONFIG, TARGETS

TINY = CONFIG.with_name("tiny.py")


def flat(recipe: Recipe) -> dict[str, object]:
    """All values under dotted names, except the run's directory."""
    values = {}
    for name, value in dataclasses.asdict(recipe).items():
        values |= {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in values.items() if name != "out"}


def test_every_cell_differs_from_its_student_in_what_it_says():
    students = {method: flat(Recipe.from_config(read_config(f"{TINY}:{method}"))) for method in METHODS}
    for name in CELLS:
        student, *changes = name.split("+")
        values = flat(Recipe.from_config(read_config(f"{CONFIG}:{name}")))
        different = {key: value for key, value in values.items() if value != students[student][key]}
        assert different == {key: value for change in changes for key, value in CHANGES[change].items()}, name
    assert len({Recipe.from_config(read_config(f"{CONFIG}:{name}")).out for name in CELLS}) == len(CELLS)


def test_unchanged_modes_are_those_of_the_recipe(tmp_path):
    study = Study(tmp_path, steps=10, prompts=2)
    for method, counts in MODES.items():
        assert [study.recipe(cell(method, modes(method, k))).adapter.modes for k in counts] == list(counts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arcflow+nfe-3", "no change is called nfe-3; known are nfe-1, nfe-4"),
        ("arcflow+slow-head+slow-momenta", "two changes set the same value"),
        ("quadratic", "known variants are arcflow, linear, legendre"),
    ],
)
def test_unknown_cells_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        read_config(f"{CONFIG}:{name}")


@pytest.mark.parametrize(
    ("part", "factors"),
    [
        ("zero-momenta", (1.0, 1.0, 0.0)),
        ("slow-momenta", (1.0, 1.0, 0.1)),
        ("slow-head", (1.0, 0.3, 0.3)),
        ("fast-head", (1.0, 3.0, 3.0)),
    ],
)
def test_parts_of_the_head_learn_at_rates_of_their_own(part, factors):
    recipe = Recipe.from_config(read_config(f"{CONFIG}:arcflow+{part}"))
    _, _, abstract = split_model(FLUX.student(FLUX_CONFIG, recipe.adapter.with_targets(TARGETS), jnp.float32))
    adapter = jax.tree.map(lambda _: jnp.ones(()), abstract)
    optimizer = make_optimizer(recipe.optimizer, adapter)
    updates, _ = optimizer.update(adapter, optimizer.init(adapter), adapter)
    steps = {".".join(map(str, path)): float(x[...]) for path, x in nnx.to_flat_state(updates)}
    layers = ("norm_out.linear", "proj_out_means", "proj_out_loggamma")
    lora = steps["backbone.single_transformer_blocks.proj_mlp.lora.a"]
    assert [steps[f"head.{layer}.kernel"] / lora for layer in layers] == pytest.approx(list(factors), rel=1e-4)


class Small(Study):
    """A study of students that train in a moment."""

    def recipe(self, cell: str, seed: int = 0) -> Recipe:
        recipe = super().recipe(cell, seed)
        adapter = dataclasses.replace(recipe.adapter, rank=2)
        distillation = dataclasses.replace(recipe.distillation, states=2)
        values = {"resolutions": ((32, 32),), "batch": 2, "mesh": (1, 1, 1, 1)}
        return dataclasses.replace(recipe, adapter=adapter, distillation=distillation, **values)


@pytest.mark.slow
def test_resumes_where_it_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.ablation.study.EULER", (2, 50))
    study = Small(tmp_path / "study", steps=2, prompts=2)
    study.run(["legendre+nfe-1"], 1)
    errors = {(r.cell, r.steps): r.figures["endpoint_error"] for r in study.results()}
    half, whole = ("legendre+nfe-1", 1), ("legendre+nfe-1", 2)
    assert set(errors) == {half, whole, ("teacher-2-guidance-1", 0), ("teacher-50-guidance-1", 0)}
    assert errors["teacher-2-guidance-1", 0] > errors["teacher-50-guidance-1", 0] == 0
    assert errors[half] != errors[whole]
    diversity = {r.cell: r.figures["diversity"] for r in study.results()}
    assert diversity["teacher-50-guidance-1"] == 1
    assert 0.1 < diversity["legendre+nfe-1"] < 10
    said = capsys.readouterr().out
    assert "resumes after training step 1" in said
    assert "2 of 2: endpoint error" in said

    # Finished results are not computed again
    log = tmp_path / "study" / "runs" / "legendre+nfe-1" / "0" / "log.jsonl"
    before = log.read_text()
    Small(tmp_path / "study", steps=2, prompts=2).run(["legendre+nfe-1"], 1)
    assert "0 evaluations to make" in capsys.readouterr().out
    assert log.read_text() == before

    # A run cannot be evaluated at a step that it has passed
    study.file("legendre+nfe-1", 0, 1).unlink()
    with pytest.raises(UserError, match=r"legendre\+nfe-1/0 is past step 1, which was not evaluated: remove it"):
        study.run(["legendre+nfe-1"], 1)
    with pytest.raises(UserError, match=r"a study with steps 2, prompts 2, teacher [0-9a-f]{12}: choose"):
        Study(tmp_path / "study", steps=3, prompts=2)
    monkeypatch.setattr(Small, "recipe", Study.recipe)
    with pytest.raises(UserError, match=r"holds a run of other settings: adapter\.rank was 2, not 32"):
        study.run(["legendre+nfe-1"], 1)


def result(cell: str, error: float, seed: int = 0, steps: int = 10, diversity: float | None = 0.5) -> Result:
    figures = {"endpoint_error": error, "frechet_distance": 2.5, "prompt_agreement": 0.75}
    if diversity is not None:
        figures["diversity"] = diversity
    return Result(cell, seed, steps, 0.5, figures)


def test_table_has_the_finished_results(tmp_path):
    study = Study(tmp_path, steps=10, prompts=16)
    with pytest.raises(UserError, match="contains no finished results"):
        report.write(study)
    (tmp_path / "results").mkdir()
    for seed in range(3):
        study.keep(result("arcflow", 0.01 * (seed + 1), seed, diversity=0.7 + 0.1 * seed))
        study.keep(result("arcflow", 0.03 * (seed + 1), seed, steps=5))
    study.keep(result("linear+nfe-4", 0.5, diversity=None))
    study.keep(result("linear+nfe-4+shift-1", 0.6))
    study.keep(result(teacher(2, 2.0), 0.7, steps=0))
    report.write(study)
    text = (tmp_path / "table.md").read_text()
    assert "| arcflow | 3 | 0.0200 ± 0.0100 | 2.50 ± 0.00 | 75.0 ± 0.0 % | 0.800 ± 0.100 | 0.500 | 5 |" in text
    assert "| linear+nfe-4 | 1 | 0.5000 | 2.50 | 75.0 % | – | 0.500 | 5 |" in text
    assert "| **others** |  |  |  |  |  |  |  |\n| linear+nfe-4+shift-1 | 1 | 0.6000 |" in text
    assert "| teacher-2 | – | 0.7000 | 2.50 | 75.0 % | 0.500 | – | – |" in text
    assert "|  | 5 steps | 10 steps |\n| --- | --- | --- |\n| arcflow | 0.0600, 2 s | 0.0200, 5 s |" in text
    assert "legendre" not in text.replace("Legendre", "")
    with Image.open(tmp_path / "ablation.png") as figure:
        assert figure.width > figure.height > 500


def test_figure_draws_means_and_spreads(tmp_path):
    results = [result("arcflow", 0.01 * (seed + 1), seed) for seed in range(3)] + [result("arcflow+nfe-1", 0.3)]
    drawn = report.figure(report.Finished(results, 10, [2.0]))
    (container,) = drawn.axes[0].containers  # the panel of NFE
    line, _, (spread,) = container
    assert [tuple(point) for point in line.get_xydata()] == [(1, 0.3), (2, pytest.approx(0.02))]
    assert [tuple(ends[:, 1]) for ends in spread.get_segments()] == [(0.3, 0.3), pytest.approx((0.01, 0.03))]


def test_compared_cells_are_evaluated_during_training(tmp_path):
    study = Study(tmp_path, steps=400, prompts=2)
    assert {name: study.stops(name) for name in COMPARED} == {name: [100, 200, 300, 400] for name in COMPARED}
    assert study.stops("arcflow+slow-head") == [400]
    assert set(COMPARED) < set(CELLS)


@pytest.mark.parametrize(("steps", "prompts", "message"), [(0, 2, "steps is 0"), (1, 1, "prompts is 1, but must be")])
def test_impossible_budgets_are_refused(tmp_path, steps, prompts, message):
    with pytest.raises(UserError, match=message):
        Study(tmp_path, steps, prompts)
