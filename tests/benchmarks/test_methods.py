"""The comparison of methods: its protocol, its search, its files, its tables and figures."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.demo.run import TEACHERS
from arcflow_jax.errors import UserError
from arcflow_jax.flow.distill import distil, teacher_share
from arcflow_jax.flow.momentum import Mixture
from arcflow_jax.training.recipe import Recipe, read_config
from benchmarks.methods import figures, plan, protocol, report, search, tables
from benchmarks.methods.__main__ import main
from benchmarks.methods.protocol import (
    BATCHES,
    METHODS,
    PUBLISHED,
    RATES,
    SCHEDULES,
    SCOPES,
    SEEDS,
    STOPS,
    Cell,
    Setting,
    calls_of_step,
)
from benchmarks.methods.results import Files, Result, errors
from benchmarks.methods.trial import split_prompts

SCOPE = SCOPES["tiny-flux"]
CELL = Cell("momentum-16", *SCOPE.first)


def recipe(cell: Cell = CELL, setting: Setting = PUBLISHED, seed: int = 0, **options: bool) -> Recipe:
    return protocol.recipe("tiny-flux", Path("home"), Path("out"), cell, setting, seed, SCOPE.calls, **options)


def flat(recipe: Recipe) -> dict[str, object]:
    values = {}
    for name, value in dataclasses.asdict(recipe).items():
        values |= {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
    return values


# The protocol


@pytest.mark.parametrize("method", METHODS)
def test_a_run_differs_from_the_bundled_recipe_in_what_the_protocol_says(method):
    usual = flat(Recipe.from_config(read_config("tiny")))
    cell, setting = Cell(method, 4, 3.2), Setting(3e-3, 64, "never")
    found = flat(recipe(cell, setting, seed=7))
    places = {
        "model",
        "prompts",
        "out",
        "preview_every",
        "keep_last",
        "max_skipped",
        "log_every",
        "save_every",
        "keep_every",
    }
    changed = {name: x for name, x in found.items() if x != usual[name] and name not in places}
    # 51 200 calls of batch 64, 4 segments and 4 states are 50 steps. Warm-up is 5 % of them, as 20 are of 400
    expected = {"steps": 50, "batch": 64, "seed": 7, "distillation.nfe": 4, "distillation.shift": 3.2}
    expected |= {"optimizer.learning_rate": 3e-3, "optimizer.decay_steps": 0, "distillation.decay": 10**9}
    expected |= dict.fromkeys(("optimizer.warmup", "optimizer.clip_from", "ema.start"), 2)
    assert changed == expected | {name: x for name, x in METHODS[method].items() if x != usual[name]}


def test_the_published_recipe_has_the_published_settings():
    """Lengths as shares of the training steps: 2000, 100 and 100 of 10 000."""
    published = Recipe.from_config(read_config("flux:published"))
    found = recipe(published=True)
    assert found.steps == 400
    for read in (
        lambda r: (r.batch, r.adapter.dropout, r.adapter.modes, r.optimizer.learning_rate, r.optimizer.groups),
        lambda r: (r.distillation.mode_dropout, r.distillation.states, r.optimizer.decay_steps, r.ema.power),
        lambda r: [x / r.steps for x in (r.distillation.decay, r.optimizer.warmup, r.optimizer.clip_from, r.ema.start)],
    ):
        assert read(found) == read(published)
    assert recipe(Cell("linear", 2, 3.2), published=True).optimizer.groups == ()


@pytest.mark.parametrize(("schedule", "shares"), [("0", (0, 0, 0)), ("1/5", (1, 0, 0)), ("1", (1, 0.5, 0))])
def test_schedules_of_the_teachers_share(schedule, shares):
    settings = recipe(setting=Setting(1e-3, 16, schedule))
    found = [float(teacher_share(step, settings.distillation)) for step in (0, 200, 400)]
    assert found == pytest.approx(shares)


def test_a_share_that_never_falls():
    settings = recipe(setting=Setting(1e-3, 16, "never"))
    assert float(teacher_share(settings.steps, settings.distillation)) > 1 - 1e-6


@pytest.mark.parametrize("share", [None, 0.5])
def test_calls_are_those_that_distillation_makes(share):
    rows = []

    def teacher(x: jax.Array, sigma: jax.Array) -> jax.Array:
        jax.debug.callback(lambda sigma: rows.append(len(sigma)), sigma)
        return x

    def student(params: jax.Array, x: jax.Array, sigma: jax.Array, key: jax.Array) -> Mixture:
        batch, tokens, _ = x.shape
        means = jnp.zeros((batch, tokens, 1, 16, 4)) + params
        return Mixture(means, jnp.zeros((batch, tokens, 1, 4)), jnp.zeros((batch, tokens, 0, 4)))

    settings = recipe(Cell("linear", 4, 1.0), Setting(1e-3, 8, "1/5"))
    noise = jnp.ones((settings.batch, 1, 64))
    part = None if share is None else jnp.float32(share)
    key = jax.random.key(0)
    jax.block_until_ready(
        distil(student, jnp.zeros(()), teacher, noise, key, settings=settings.distillation, teacher_share=part)
    )
    jax.effects_barrier()
    assert sum(rows) == calls_of_step(settings)


def test_budgets_are_equal_and_end_at_whole_training_steps():
    for nfe in sorted({nfe for nfe, _ in SCOPE.methods}):
        for batch in BATCHES:
            settings = recipe(Cell("linear", nfe, 1.0), Setting(1e-3, batch, "0"))
            assert settings.steps * calls_of_step(settings) == SCOPE.calls
            stops = [protocol.stop_after(stop, settings.steps) for stop in STOPS]
            assert stops == sorted(set(stops))
            assert stops[-1] == settings.steps
            # Where a run saves checkpoints that stay
            assert all(stop % settings.save_every == 0 for stop in stops[:-1])
            assert settings.keep_every == settings.save_every
    with pytest.raises(UserError, match="100 teacher calls do not suffice for a training step, which has 128"):
        protocol.recipe("tiny-flux", Path("home"), Path("out"), CELL, PUBLISHED, 0, 100)


def test_validation_prompts_are_of_their_own():
    world = TEACHERS["tiny-flux"].world
    texts, test = (read_prompts(path).texts for path in (world.train_prompts, world.test_prompts))
    train, validation = split_prompts(texts)
    assert len(validation) == 256
    assert not set(validation) & {*train, *test}
    assert 0.75 < len(train) / len(texts) < 0.85
    # The test prompts' kind: captions that leave the background open have the most curved trajectories
    named = [sum("background" in text for text in some) / len(some) for some in (validation, test)]
    assert abs(named[0] - named[1]) < 0.1


@pytest.mark.parametrize("teacher", SCOPES)
def test_a_method_has_the_published_trajectory_unless_its_name_says_otherwise(teacher):
    """Whatever the teacher's own recipe has."""
    for method in METHODS:
        cell, scope = Cell(method, *SCOPES[teacher].first), SCOPES[teacher]
        found = protocol.recipe(teacher, Path("home"), Path("out"), cell, PUBLISHED, 0, scope.calls).distillation
        assert (found.least_share, found.cuts) == ((0.4, "stratified") if "share" in method else (0.0, "sorted"))


@pytest.mark.parametrize("teacher", SCOPES)
def test_the_published_recipe_is_run_where_its_method_is(teacher):
    scope = SCOPES[teacher]
    assert all(cell.method in scope.methods[cell.nfe, cell.shift] for cell in scope.published)
    assert not any("share" in cell.method for cell in scope.published)
    assert plan.parts(scope.published[0], scope) == ["best", "published"]
    assert plan.parts(dataclasses.replace(scope.published[0], nfe=1), scope) == ["best"]


def test_a_scope_may_begin_with_a_setting():
    scope = SCOPES["tiny-emoji"]
    cell = Cell("linear", *scope.first)
    assert plan.start([], cell, scope) == [scope.start, *search.neighbours(scope.start)]
    assert not protocol.has_grid(cell, scope)
    assert plan.start([], dataclasses.replace(cell, nfe=1), scope) is None


@pytest.mark.parametrize("teacher", SCOPES)
def test_every_search_goes_back_to_one_that_begins_by_itself(teacher):
    scope = SCOPES[teacher]
    cells = {Cell(method, *place) for place, methods in scope.methods.items() for method in methods}
    for cell in cells:
        ways = [cell]
        while (before := protocol.parent(ways[-1], scope)) is not None:
            assert before in cells - set(ways)
            ways.append(before)


def test_a_method_may_begin_with_the_best_setting_of_another():
    cell = Cell("momentum-4", *SCOPE.first)
    assert plan.start([], cell, SCOPE) is None
    known = [result("search", 0.1, 0, setting=Setting(1e-3, 32, "1/5"))]  # of momentum-16
    assert plan.start(known, cell, SCOPE)[0] == Setting(1e-3, 32, "1/5")


def test_only_at_the_first_nfe_and_shift_a_student_is_tested_at_every_stop():
    other = dataclasses.replace(CELL, nfe=1)
    assert plan.stops("best", CELL, SCOPE, 1.0) == list(STOPS)
    assert plan.stops("search", other, SCOPE, 1 / 4) == [1 / 8, 1 / 4]
    known = [result("search", 0.1, 0, 0.5, nfe=1), result("search", 0.2, 0, 1.0, nfe=1)]
    until = plan.end(known, "best", other, SCOPE)
    assert (until, plan.stops("best", other, SCOPE, until)) == (0.5, [0.5])
    assert plan.end(known, "published", other, SCOPE) == 1
    assert plan.end([dataclasses.replace(each, nfe=2) for each in known], "best", CELL, SCOPE) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nfe", "3"], "the protocol has no such NFE and shift: it has NFE 2 with shift 0.6, NFE 1 with shift 0.6,"),
        (
            ["--nfe", "1", "--methods", "momentum-4"],
            "no method given is compared there; these are: linear, momentum-16,",
        ),
        (["--prompts", "1"], "prompts is 1, but must be from 2 to 512"),
    ],
)
def test_impossible_options_are_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["methods", "--out", str(tmp_path), "--results", str(tmp_path), *options])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err


# The search


def distance(setting: Setting, rate: float, batch: int, schedule: str) -> int:
    """Steps on the axes between a setting and the given one."""
    pairs = [
        (RATES, setting.rate, rate),
        (BATCHES, setting.batch, batch),
        (tuple(SCHEDULES), setting.schedule, schedule),
    ]
    return sum(abs(values.index(a) - values.index(b)) for values, a, b in pairs)


def searched(
    least: tuple[float, int, str], stop: float = 1.0, start: list[Setting] | None = None, further: bool = True
):
    """What a search finds, and all that it measured, if errors grow with the distance to `least` and to `stop`."""
    found = {}
    start = search.grid() if start is None else start
    while wanted := search.missing(found, start, further=further):
        assert all(part not in [p for s, p in found if s == setting] for setting, part in wanted)
        setting, until = wanted[0]
        for part in (part for part in STOPS if part <= until):
            found[setting, part] = 1 + distance(setting, *least) + abs(math.log2(part / stop)) / 10
    return search.best(found), found


@pytest.mark.parametrize("stop", [1.0, 0.5])
@pytest.mark.parametrize("least", [(1e-3, 32, "never"), (3e-5, 32, "1"), (1e-2, 16, "1/5"), (3e-4, 64, "0")])
def test_the_search_finds_the_least_error_also_beyond_the_grid(least, stop):
    (setting, part), found = searched(least, stop)
    assert (setting, part) == (Setting(*least), stop)
    assert len(search.whole(found)) <= search.MOST
    # All of the grid have the first quarter; best setting and neighbours have all
    assert all((each, search.FIRST) in found for each in search.grid())
    if len(search.whole(found)) < search.MOST:
        assert set(search.neighbours(setting)) <= set(search.whole(found))


def test_a_search_may_end_with_the_best_third():
    good = Setting(1e-3, 32, "1/5")
    (setting, _), found = searched((1e-3, 16, "1/5"), start=[good, *search.neighbours(good)], further=False)
    assert setting == Setting(1e-3, 16, "1/5")
    assert {each for each, _ in found} == {good, *search.neighbours(good)}
    assert len(search.whole(found)) == 3


def test_a_search_ends_after_most_settings():
    _, found = searched((1e-5, 128, "0"))
    assert len(search.whole(found)) == search.MOST


def test_a_third_of_the_grid_gets_the_whole_budget():
    settings = search.grid()
    known = {(setting, search.FIRST): float(i) for i, setting in enumerate(settings)}
    known[settings[0], search.FIRST] = math.nan  # a run that failed is never the best
    third = math.ceil(len(settings) / 3)
    assert search.missing(known, settings, further=True) == [(setting, 1.0) for setting in settings[1 : 1 + third]]


def test_neighbours_are_one_step_away():
    found = search.neighbours(Setting(1e-4, 8, "never"))
    assert found == [
        *(Setting(3e-5, 8, "never"), Setting(3e-4, 8, "never")),
        *(Setting(1e-4, 16, "never"), Setting(1e-4, 8, "1")),
    ]


# Results, plan


def result(part: str = "best", error: float = 0.5, seed: int = 1, share: float = 1.0, **values: object) -> Result:
    measured = {"endpoint_error": error, "frechet_distance": 2.5, "prompt_agreement": 0.75, "diversity": 0.9}
    measured["prompt_agreement_by_attribute"] = {"shape": 0.5}
    steps = int(400 * share)
    used = {"share": share, "steps": steps, "calls": 128 * steps, "seconds": 0.5, "loss": 2.0, "figures": measured}
    return Result(**{"part": part, **vars(CELL), "setting": PUBLISHED, "seed": seed} | used | values)


TEACHER = dataclasses.replace(result(error=0.25), part="teacher", method="teacher", nfe=4, shift=0.0, setting=None)


def test_results_are_kept(tmp_path):
    files = Files(tmp_path, {"calls": 5})
    kept = [result(), result("search", math.nan), TEACHER]
    for each in kept:
        files.keep(each)
    found = files.all()
    assert sorted(str(each) for each in found if each.error < 1) == sorted(map(str, (kept[0], kept[2])))
    assert errors(found, CELL) == {(PUBLISHED, 1.0): math.inf}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["nfe-2-shift-0.6", "protocol.json", "teacher.jsonl"]

    # A line that was cut off is measured again
    file = files.path(result())
    file.write_bytes(file.read_bytes()[:-5])
    assert len(files.all()) == 2
    files.keep(result(seed=3))
    assert [each.seed for each in files.all() if each.part == "best"] == [1, 3]

    with pytest.raises(
        UserError, match="has results of another protocol: calls was 5, not 6; choose another --results"
    ):
        Files(tmp_path, {"calls": 6})


def test_what_is_left():
    cells = [CELL, Cell(CELL.method, 2, 3.2)]
    everything = plan.runs_left([], cells, SCOPE)
    known = []
    for cell in cells:
        values = {"shift": cell.shift}
        while wanted := plan.missing(known, cell, SCOPE):
            (setting, until), before = wanted[0], plan.runs_left(known, cells, SCOPE)
            known.append(result("search", 2 - until, 0, until, setting=setting, **values))
            assert plan.runs_left(known, cells, SCOPE) <= before
        known += [result(part, seed=seed, **values) for part in plan.parts(cell, SCOPE) for seed in SEEDS[:-1]]
    schedules = [dataclasses.replace(PUBLISHED, schedule=schedule) for schedule in SCHEDULES]
    known += [result("schedules", setting=setting) for setting in schedules]
    assert plan.runs_left(known, cells, SCOPE) == 3  # a seed of each, and of the published recipe
    assert everything > 2 * len(SEEDS) + 10


# Tables, figures


def study() -> list[Result]:
    best, other = Setting(1e-3, 32, "never"), Setting(3e-4, 32, "never")
    found = [TEACHER]
    found += [result("search", 0.2, 0, 1.0, setting=other), result("search", 0.3, 0, 0.5, setting=best)]
    found += [result("search", 0.1, 0, 0.5, setting=best), result("search", 0.15, 0, 1.0, setting=best)]
    found += [result("best", 0.01 * seed, seed, 0.5, setting=best) for seed in (1, 2, 3)]
    found += [result("best", 0.03 * seed, seed, 1.0, setting=best) for seed in (1, 2, 3)]
    found.append(result("published", 0.5))
    parts = {"local": 0.25, "drift": 0.125, "total": 0.5}
    found[5].figures["segments"] = [{"sigma": [1.0, 0.5], "velocity": parts, "state": parts}]
    for share, error in ((0.5, 0.04), (1.0, 0.06)):
        found.append(result("schedules", error, 1, share, setting=best))
        found[-1].figures["segments"] = found[5].figures["segments"]
    return found


def test_tables(tmp_path):
    with pytest.raises(UserError, match="has no results yet: run without --report first"):
        report.write(tmp_path, [TEACHER])
    report.write(tmp_path, study())
    text = (tmp_path / "tables.md").read_text()
    measured = "2.50 ± 0.00 | 75.0 ± 0.0 % | 50.0 ± 0.0 % | 0.900 ± 0.000 |"
    assert f"| momentum-16 | 3 | 0.001 | 32 | never | 200 | 25,600 | 100 | 0.0200 ± 0.0100 | {measured}" in text
    assert "| momentum-16, published recipe | 1 | 0.0001 | 16 | 1/5 | 400 | 51,200 | 200 | 0.5000 | 2.50 |" in text
    assert "| 4 | 0.2500 | 2.50 | 75.0 % | 50.0 % | 0.900 |" in text
    assert "| momentum-16 | 0.0200 ± 0.0100; 2.000 ± 0.000 | 0.0600 ± 0.0300; 2.000 ± 0.000 |" in text
    assert "| momentum-16 | 1: σ 1.000 to 0.500 | 0.25 | 0.125 | 0.25 | 0.125 |" in text
    assert "| momentum-16, never | 0.0400; 2.000; 0.250 | 0.0600; 2.000; 0.250 |" in text
    assert "legendre" not in text
    for name in ("overview", "nfe-2-shift-0.6"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 300


def test_a_best_setting_that_changed_is_shown_when_it_is_measured():
    """A search that continues can find another setting: what was measured of the first is not shown as its."""
    found = study()
    found.append(result("search", 0.05, 0, 1.0, setting=Setting(3e-3, 32, "never")))
    assert tables.shown(found, CELL, "best") == []


def test_the_frontier_of_cost():
    points = [(3.0, 0.5), (1.0, 0.9), (2.0, 0.4), (1.0, 1.5), (4.0, 0.3)]
    assert figures.frontier(points) == [(1.0, 0.9), (2.0, 0.4), (4.0, 0.3)]


def test_figure_draws_means_and_spreads():
    drawn = figures.overview(study())
    containers = {container.get_label(): container for container in drawn.axes[0].containers}
    line, _, (spread,) = containers["momentum-16"]
    assert [tuple(point) for point in line.get_xydata()] == [(2, pytest.approx(0.02))]
    assert [tuple(ends[:, 1]) for ends in spread.get_segments()] == [pytest.approx((0.01, 0.03))]
    assert [tuple(point) for point in containers["teacher, Euler steps"][0].get_xydata()] == [(4, 0.25)]
