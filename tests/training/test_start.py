"""What a run starts from: another student; and the plan of prompts that have image sizes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arcflow_jax.checkpoints.student_formats import export_adapter
from arcflow_jax.checkpoints.training import AdapterDescription
from arcflow_jax.data.prompts import Prompts
from arcflow_jax.errors import UserError
from arcflow_jax.training import plan as planning
from arcflow_jax.training.loop import train
from arcflow_jax.training.plan import Plan
from tests.helpers.tiny_run import recipe, saved


@pytest.fixture(scope="module")
def model(tiny_flux, tmp_path_factory) -> Path:
    return shutil.copytree(tiny_flux, tmp_path_factory.mktemp("model") / "teacher")


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory) -> Path:
    """A student after three training steps, with EMA weights of its own."""
    return train(recipe(model, tmp_path_factory.mktemp("run") / "run", steps=3))


def part(state: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint below `name`."""
    return {path.removeprefix(f"['{name}']"): x for path, x in state.items() if path.startswith(f"['{name}']")}


def assert_starts_from(run: Path, ema: dict[str, np.ndarray]) -> None:
    """A run of no steps has these weights, and nothing else of the run that they come from."""
    state = saved(run)
    for name in ("adapter", "ema"):
        ours = part(state, name)
        assert ours.keys() == ema.keys()
        for path, x in ours.items():
            np.testing.assert_array_equal(x, ema[path], err_msg=path)
    assert state["['step']"] == 0
    assert not any(np.any(x) for x in part(state, "optimizer").values())


def test_a_run_starts_from_the_ema_weights_of_another(model, trained, tmp_path):
    before = saved(trained)
    ema = part(before, "ema")
    assert any(np.any(x != part(before, "adapter")[path]) for path, x in ema.items())
    run = train(recipe(model, tmp_path / "run", steps=0, start_from=str(trained), seed=1))
    assert_starts_from(run, ema)
    assert json.loads((run / "config.json").read_text())["start_from"] == str(trained)


def test_a_run_starts_from_a_released_student(model, trained, tmp_path):
    released = export_adapter(trained, tmp_path / "released", dtype=np.float32)
    run = train(recipe(model, tmp_path / "run", steps=0, start_from=str(released)))
    assert_starts_from(run, part(saved(trained), "ema"))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"rank": 3},
            "another adapter than the recipe: rank 2 there and 3 here, alpha 2.0 there and 3.0 here; set --con",
        ),
        ({"modes": 4}, "modes 3 there and 4 here"),
        ({"alpha": 4.0}, "alpha 2.0 there and 4.0 here"),
        ({"targets": ("transformer_blocks.ff.*",)}, r"LoRA targets: backbone\.\S+ is trained in one of them only"),
    ],
)
def test_a_student_of_another_shape_is_refused(model, trained, tmp_path, adapter, message):
    with pytest.raises(UserError, match=message):
        train(recipe(model, tmp_path / "run", steps=0, start_from=str(trained), adapter=adapter))


def test_a_student_of_another_base_is_refused(model, trained, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    dataclasses.replace(AdapterDescription.read(trained), base="0" * 64).write(other)
    with pytest.raises(UserError, match="was trained on base 000000000000…, this model is"):
        train(recipe(model, tmp_path / "run", steps=0, start_from=str(other)))


def test_the_optimizer_of_an_earlier_version(model, tmp_path, monkeypatch):
    """The run says how to continue, and does so."""

    def former(config: object, adapter: object) -> optax.GradientTransformation:
        counter = optax.GradientTransformation(
            lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), lambda *args: args[:2]
        )
        return optax.chain(
            counter,
            optax.scale_by_adam(0.9, 0.95),
            optax.add_decayed_weights(0.0),
            optax.stateless(lambda updates, params: updates),
            optax.scale_by_learning_rate(lambda step: 0.1),
        )

    with monkeypatch.context() as patched:
        patched.setattr(planning, "make_optimizer", former)
        run = train(recipe(model, tmp_path / "run", steps=0))
    with pytest.raises(UserError, match=f"earlier version.*--config.start_from={run} and a new --config.out"):
        train(recipe(model, run))
    resumed = train(recipe(model, tmp_path / "new", steps=0, start_from=str(run)))
    assert_starts_from(resumed, part(saved(run), "ema"))


TEXTS = ["a red circle", "a green square", "a blue ring", "a ring", "a yellow ring"]
SIZES = [(32, 32), (32, 32), (32, 48), (32, 32), (32, 48)]


@pytest.fixture
def sized(monkeypatch) -> None:
    """Prompts with sizes of their own."""
    monkeypatch.setattr(planning, "read_prompts", lambda source, field: Prompts("sized", TEXTS, 0, SIZES))


def test_plan_of_prompts_with_sizes(model, tmp_path, sized):
    plan = Plan.make(recipe(model, tmp_path / "run", resolutions=((64, 64),)))
    assert plan.grids == {(32, 32): (2, 2), (32, 48): (2, 3)}
    assert plan.largest_grid == (2, 3)
    assert "\n2 image sizes: 32 × 32 (3 prompts), 32 × 48 (2 prompts)" in plan.header()
    batches = plan.batches()
    for i in range(20):
        prompts, size = batches[i]
        assert len(prompts) == 8
        assert {SIZES[TEXTS.index(prompt)] for prompt in prompts} == {size}


def test_sizes_that_the_model_cannot_draw_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "read_prompts", lambda source, field: Prompts("sized", TEXTS, 0, [(32, 33)] * 5))
    with pytest.raises(UserError, match="33"):
        Plan.make(recipe(model, tmp_path / "run"))
