"""What a run writes besides its checkpoints: previews, TensorBoard, traces and Weights & Biases."""

from __future__ import annotations

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from arcflow_jax.errors import UserError
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training import plan
from arcflow_jax.training.loop import train
from arcflow_jax.training.report.log import RunLog
from arcflow_jax.training.report.preview import Preview
from tests.helpers.events import events
from tests.helpers.fake_wandb import FakeWandb
from tests.helpers.tiny_run import log, recipe


def test_weights_and_biases_of_a_resumed_run(tiny_flux, tmp_path, monkeypatch):
    """What is trained again after a checkpoint arrives, though Weights & Biases has seen later steps."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    values = {name: jnp.ones(()) for name in ("loss", "gradient_norm", "learning_rate", "teacher_share", "skipped")}
    values |= {"segment_loss": jnp.ones(2), "skipped_in_row": jnp.zeros(())}
    run = tmp_path / "run"
    run.mkdir()
    logged = recipe(tiny_flux, run, wandb_project="w")
    for done, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        with RunLog(run, logged, done) as lines:
            for step in steps:
                lines.step(step, values)
            lines.image(steps[-1], Image.new("RGB", (8, 8)))
    (project,) = wandb.runs.values()
    assert project.steps("loss") == [1, 2, 3, 2, 3, 4]
    assert project.steps("preview") == [3, 4]


def test_weights_and_biases_gets_all_lines_though_it_fails(tiny_flux, tmp_path, monkeypatch, capfd):
    """While it answers nothing a run trains; what it missed is sent once it answers, or when the run resumes."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    down, log_now = [], FakeWandb.Run.log

    def log_or_fail(run, data, step=None):
        if down:
            raise ConnectionError("no service")
        log_now(run, data, step)

    monkeypatch.setattr(FakeWandb.Run, "log", log_or_fail)
    values = {name: jnp.ones(()) for name in ("loss", "gradient_norm", "learning_rate", "teacher_share", "skipped")}
    values |= {"segment_loss": jnp.ones(2), "skipped_in_row": jnp.zeros(())}
    run = tmp_path / "run"
    run.mkdir()
    logged = recipe(tiny_flux, run, wandb_project="w")
    with RunLog(run, logged, 0) as lines:
        for step in (1, 2, 3):
            down[:] = [1] if step == 2 else []
            lines.step(step, values)
        down.append(1)
        lines.step(4, values)  # and no more, as if killed
    assert "warning: Weights & Biases: ConnectionError: no service" in capfd.readouterr().err
    (project,) = wandb.runs.values()
    assert project.steps("loss") == [1, 2, 3]
    down.clear()
    with RunLog(run, logged, 4) as lines:
        lines.step(5, values)
    assert project.steps("loss") == [1, 2, 3, 4, 5]


def test_what_is_optional_never_ends_a_run(tiny_flux, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())

    def fail(*args: object, **settings: object) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr(wandb, "init", fail)
    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    monkeypatch.setattr(Preview, "sheet", fail)
    changes = {"preview_every": 2, "preview_prompts": ("a ring",), "wandb_project": "w", "steps": 2}
    run = train(recipe(tiny_flux, tmp_path / "run", **changes), profile="1:2")
    assert [line["step"] for line in log(run)] == [1, 2]
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: no preview: RuntimeError: not today",
        "warning: Weights & Biases: RuntimeError: not today",
        "warning: the trace was not begun: RuntimeError: not today",
    ]


@pytest.mark.slow
def test_previews_trace_and_weights_and_biases(tiny_flux, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    run = tmp_path / "run"
    changes = {"preview_every": 2, "preview_prompts": ("a red circle", "a ring"), "wandb_project": "w"}
    shown = recipe(tiny_flux, run, steps=2, **changes)
    train(shown, profile="2:2")

    with Image.open(run / "previews" / "000002.png") as image:
        sheet = np.asarray(image.convert("RGB"), np.int32)
    # rows under a line of names, each under its prompt; images of 32 pixels are drawn six times as large
    teacher, raw, ema = (
        np.stack([sheet[40 + 212 * row :, 196 * column :][:192:6, :192:6] for row in range(2)]) for column in range(3)
    )
    assert sheet.shape == (20 + 2 * 212, 3 * 196 - 4, 3)
    assert (sheet[:20] < 128).any()
    assert (sheet[20:40] < 128).any()
    for one, two in ((teacher[0], teacher[1]), (teacher, raw), (raw, ema)):
        assert np.any(one != two)
    straight = ArcFlowPipeline.from_pretrained(tiny_flux)
    expected = straight(
        ["a red circle", "a ring"], height=32, width=32, seed=0, guidance_scale=shown.guidance, batch_size=2
    ).images
    np.testing.assert_allclose(teacher, np.stack([np.asarray(each, np.int32) for each in expected]), atol=1)
    for raw_weights, there in ((True, raw), (False, ema)):
        student = ArcFlowPipeline.from_pretrained(tiny_flux, run, raw=raw_weights)
        expected = student(["a red circle", "a ring"], height=32, width=32, seed=0, batch_size=2).images
        np.testing.assert_allclose(there, np.stack([np.asarray(each, np.int32) for each in expected]), atol=2)

    tags = {value.tag for event in events(run) for value in event.summary.value}
    assert {"loss", "segment_loss/1", "gradient_norm", "teacher_share", "preview"} <= tags
    assert list((run / "profile").rglob("*.xplane.pb"))
    output = capfd.readouterr().out
    assert re.search(r"trains 0\.\d+ of \d\.\d+ million parameters \(\d+\.\d+ %\) on 1 × cpu: data 1, fsdp 1", output)
    assert re.search(
        r"step 2 of 2: loss [\d.]+ \(segments [\d.]+ [\d.]+\), gradient \S+, rate 0.002, teacher 100 %, "
        r"[\d.]+ steps/s, \S+ TFLOP/s a device, 0:00:00 left",
        output,
    )
    (project,) = wandb.runs.values()
    assert project.steps("loss") == [1, 2]
    assert project.drawn[-1] == ("preview", 2, (3 * 196 - 4, 20 + 2 * 212))
    assert not project.open

    train(dataclasses.replace(shown, steps=2))
    assert len(wandb.runs) == 1
    with pytest.raises(UserError, match=r"profile 1:2 is outside the training steps of this run, 3 to 2"):
        train(shown, profile="1:2")


@pytest.mark.parametrize("text", ["3", "0:1", "5:4", "a:b"])
def test_profile_that_is_none(tiny_flux, tmp_path, text):
    with pytest.raises(UserError, match=re.escape(f"profile {text!r} is not A:B")):
        train(recipe(tiny_flux, tmp_path / "run"), profile=text)


def test_weights_and_biases_that_is_not_there(tiny_flux, tmp_path):
    if "wandb" in sys.modules:
        pytest.skip("it is installed")
    with pytest.raises(UserError, match="pip install wandb"):
        plan.Plan.make(recipe(tiny_flux, tmp_path / "run", wandb_project="w"))
