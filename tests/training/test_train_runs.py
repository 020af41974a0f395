"""Runs that are killed, preempted, diverge or fill the disk."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint._src.serialization import serialization

from arcflow_jax import families
from arcflow_jax.checkpoints.training import Checkpoints
from arcflow_jax.cli.app import main
from arcflow_jax.errors import NetworkError, UserError
from arcflow_jax.families import flux
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.storage.bucket import BucketPath
from arcflow_jax.storage.paths import as_path
from arcflow_jax.training import compile, loop, plan, state
from arcflow_jax.training.loop import describe, train
from arcflow_jax.training.optimizer import make_optimizer
from arcflow_jax.training.recipe import Recipe
from arcflow_jax.training.report import log as report_log
from arcflow_jax.training.report.log import RunLog
from tests.helpers.events import events
from tests.helpers.full_disk import disk_for_files_up_to
from tests.helpers.processes import child
from tests.helpers.tiny_run import PROMPTS, log, overrides, recipe, saved

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.py")


@pytest.fixture(scope="module")
def model(tiny_flux, tmp_path_factory) -> Path:
    return shutil.copytree(tiny_flux, tmp_path_factory.mktemp("model") / "teacher")


def assert_same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


KILLED_AT_7 = """
import os, signal, sys, time
from pathlib import Path
from tests.training.test_train_runs import RunLog, bucketed, train
model, out = map(Path, sys.argv[1:])
log_step = RunLog.step
def killing(log, step, values):
    line = log_step(log, step, values)
    if step == 7:
        while not (out / "checkpoints" / "5").exists():  # saved in the background
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return line
RunLog.step = killing
train(bucketed(model, out))
"""


def bucketed(model: Path, out: Path) -> Recipe:
    """A run on prompts of two image sizes, in both phases, with a preview."""
    prompts = out.parent / "prompts.jsonl"
    lines = [{"prompt": text, "height": 32, "width": 32 + 16 * (i % 2)} for i, text in enumerate(PROMPTS)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    changes = {"prompts": str(prompts), "steps": 10, "save_every": 5, "distillation.decay": 4}
    return recipe(model, out, **changes, preview_every=4, preview_prompts=("a ring",))


def compiled_at_each_step(patched: pytest.MonkeyPatch) -> list[int]:
    """Will have the number of programs compiled so far, as each training step is logged."""
    compiled, at_step = [], []
    log_step = RunLog.step
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))

    def counting(self, step, values):
        at_step.append(sum("backend_compile" in name for name in compiled))
        return log_step(self, step, values)

    patched.setattr(RunLog, "step", counting)
    return at_step


@pytest.mark.slow
def test_kill_and_resume_is_bit_identical(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        at_step = compiled_at_each_step(patched)
        straight = train(bucketed(model, tmp_path / "straight"))
    assert at_step[0] >= 4  # both sizes, both phases, which no other test has compiled
    # No training step compiles, and no preview; a checkpoint does, the first of which is of step 5
    assert at_step[:5] == [at_step[0]] * 5, at_step
    killed = child(KILLED_AT_7, model, tmp_path / "killed")  # which finds the compiled programs
    output, _ = killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL, output
    assert [line["step"] for line in log(tmp_path / "killed")] == list(range(1, 8))
    with open(tmp_path / "killed" / "log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # as a kill may leave it
    resumed = train(bucketed(model, tmp_path / "killed"))
    assert_same(saved(straight), saved(resumed))
    timings = ("time", "steps_per_second", "examples_per_second", "data_wait", "tflops_per_device")
    lines = [[{name: x for name, x in line.items() if name not in timings} for line in log(run)]
             for run in (straight, resumed)]  # fmt: skip
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == list(range(1, 11))
    batches = plan.Plan.make(bucketed(model, tmp_path / "plan")).batches()
    assert {batches[i][1] for i in range(10)} == {batches[i][1] for i in range(5)} == {(32, 32), (32, 48)}
    shown = [[(e.step, v.tag) for e in events(run) for v in e.summary.value if v.tag == "loss"]
             for run in (straight, resumed)]  # fmt: skip
    assert shown[0] == shown[1] == [(step, "loss") for step in range(1, 11)]
    assert len({line["teacher_share"] > 0 for line in log(straight)[:5]}) == 2
    assert (straight / "previews" / "000004.png").exists()

    # what is left can be sampled from, with EMA weights and without
    few = [ArcFlowPipeline.from_pretrained(model, straight, raw=raw) for raw in (False, True)]
    sampled = [pipe(PROMPTS[:1], height=32, width=32, seed=3).images for pipe in few]
    assert np.any(np.asarray(sampled[0][0]) != np.asarray(sampled[1][0]))


def test_preempted_run_saves_and_exits_with_143(model, tmp_path, monkeypatch, capfd):
    log_step = RunLog.step

    def preempting(self, step, values):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return log_step(self, step, values)

    monkeypatch.setattr(RunLog, "step", preempting)
    before = signal.getsignal(signal.SIGTERM)
    # The teacher's share reaches zero only after the checkpoint
    arguments = overrides(model, tmp_path / "run", **{"distillation.decay": 3, "save_every": 3})
    with monkeypatch.context() as patched:
        order, save = [], Checkpoints.save
        patched.setattr(report_log, "upload", lambda file: order.append("log"))
        patched.setattr(Checkpoints, "save", lambda *arguments: order.append("checkpoint") or save(*arguments))
        assert exit_code(["train", "--config", TINY, *arguments]) == 143
    assert order == ["log", "checkpoint"]  # in a bucket, a kill after the checkpoint leaves no line of it out
    message = f"preempted: checkpoint at step 2 of 4 written to {tmp_path / 'run'}; run the same command to resume\n"
    assert capfd.readouterr().out.endswith(message)
    assert signal.getsignal(signal.SIGTERM) == before
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["2"]
    monkeypatch.setattr(RunLog, "step", log_step)
    changes = {"distillation.decay": 3}
    with monkeypatch.context() as patched:
        at_step = compiled_at_each_step(patched)
        resumed = train(recipe(model, tmp_path / "run", **changes))
    assert at_step[0] == at_step[1]  # the phase in which the share is zero was compiled beforehand
    assert [line["step"] for line in log(resumed)] == [1, 2, 3, 4]
    assert [line["teacher_share"] > 0 for line in log(resumed)] == [True, True, True, False]
    assert_same(saved(resumed), saved(train(recipe(model, tmp_path / "straight", **changes))))


def exit_code(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as exit:
        return exit.code or 0
    return 0


def test_full_disk_under_the_log(model, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    settings = recipe(model, run)
    numbers = ("loss", "gradient_norm", "learning_rate", "teacher_share", "skipped", "skipped_in_row")
    values = {"segment_loss": jnp.ones(2), **dict.fromkeys(numbers, jnp.ones(()))}

    def write_a_line() -> None:
        with RunLog(run, settings, 0) as log:
            log.step(1, values)

    message = r"^cannot write to .*/run, its checkpoints are intact: File too large$"
    with disk_for_files_up_to(0), pytest.raises(UserError, match=message):
        write_a_line()
    assert capsys.readouterr().err == ""


def test_a_bucket_that_does_not_take_the_log_may_do_so_later(model, tmp_path, monkeypatch):
    """So the exit code is 1: tools/launch/jobset.yaml does not start again what ends with 2."""

    def no_answer(*args: object, **settings: object) -> None:
        raise ConnectionError(errno.EIO, "bucket b does not answer, try again")

    for name in ("info", "write_bytes"):
        monkeypatch.setattr(BucketPath, name, no_answer)
    run, settings = as_path("gs://b/run"), recipe(model, tmp_path / "run")
    for write in (lambda: RunLog(run, settings, 0), lambda: settings.write(run), lambda: describe(run, None)):
        with pytest.raises(NetworkError, match=r"^cannot write to gs://b/run.*: bucket b does not answer, try again$"):
            write()


def poison(monkeypatch, steps: set[int]) -> None:
    """Makes the guidance of some training steps, counted from 1, NaN, and with it loss and gradient."""
    real = flux.FAMILY.prompts

    class Poisoned(real):
        seen = 0

        def __call__(self, prompts, **settings):
            conditioning = super().__call__(prompts, **settings)
            self.seen += 1
            if self.seen in steps:
                return dataclasses.replace(conditioning, guidance=conditioning.guidance * jnp.nan)
            return conditioning

    monkeypatch.setitem(families._FAMILIES, "FluxPipeline", dataclasses.replace(flux.FAMILY, prompts=Poisoned))


def test_training_steps_that_are_not_finite_are_skipped(model, tmp_path, monkeypatch):
    poison(monkeypatch, {2})
    run = train(recipe(model, tmp_path / "run", steps=3, save_every=1, keep_last=3))
    assert [line["skipped"] for line in log(run)] == [0, 1, 1]
    assert [line["skipped_in_row"] for line in log(run)] == [0, 1, 0]
    assert [line["loss"] is None for line in log(run)] == [False, True, False]
    with Checkpoints(run) as checkpoints:
        one, two, three = (checkpoints.manager.restore(step) for step in (1, 2, 3))
    assert [int(x["step"]) for x in (one, two, three)] == [1, 2, 3]
    for part in ("adapter", "ema", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, one[part], two[part])
        changed = jax.tree.map(lambda x, y: bool(np.any(np.asarray(x) != np.asarray(y))), two[part], three[part])
        assert any(jax.tree.leaves(changed))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(three))


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run(model, tmp_path, monkeypatch, capfd):
    """Here loss and gradient are finite, and the optimizer makes NaN of them."""

    def broken(*args):
        return optax.chain(make_optimizer(*args), optax.scale(jnp.nan))

    for module in (plan, state):
        monkeypatch.setattr(module, "make_optimizer", broken)
    write, told = serialization.async_serialize_from_host, loop.too_many_skipped
    there: list[list[str]] = []

    async def write_slowly(*args: object, **settings: object) -> None:
        await asyncio.sleep(1)
        await write(*args, **settings)

    def look(*args):
        there.append(os.listdir(tmp_path / "run" / "checkpoints"))
        return told(*args)

    monkeypatch.setattr(serialization, "async_serialize_from_host", write_slowly)
    monkeypatch.setattr(loop, "too_many_skipped", look)
    changes = {
        "steps": 90,
        "save_every": 10,
        "max_skipped": 2,
        "optimizer.learning_rate": 1e-3,
    }  # no other test has compiled this
    arguments = overrides(model, tmp_path / "run", **changes)
    assert exit_code(["train", "--config", TINY, *arguments]) == 2
    error = capfd.readouterr().err
    assert re.fullmatch(r"error: stopped: loss, gradient or update of the last 3 training steps was .*\n", error)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["3"]
    assert there == [["3"]]  # complete before the error is reported: the other processes exit soon after
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoints.manager.restore(3)))


def test_other_settings_are_named(model, tmp_path):
    train(recipe(model, tmp_path / "run", steps=0))
    with pytest.raises(
        UserError, match=r"other settings: optimizer.learning_rate was 0.002, not 0.1, seed was 0, not 1;"
    ):
        train(recipe(model, tmp_path / "run", **{"seed": 1, "optimizer.learning_rate": 0.1}))
    train(recipe(model, tmp_path / "run", steps=0, log_every=7))  # which does not change the numbers
    assert json.loads((tmp_path / "run" / "config.json").read_text())["log_every"] == 7


def test_out_of_memory_is_told_before_the_first_training_step(model, tmp_path, monkeypatch):
    def full(*args: object, **settings: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(compile, "train_step", types.SimpleNamespace(trace=full))
    with pytest.raises(
        UserError, match=r"^out of memory in a training step of 4 image tokens: try a larger accumulate, "
    ):
        train(recipe(model, tmp_path / "run"))
    assert not log(tmp_path / "run")


def test_dry_run(model, tmp_path, capfd):
    run = tmp_path / "run"
    changed = overrides(model, run, **{"optimizer.warmup": 7})
    assert exit_code(["train", "--dry-run", "--config", TINY, *changed]) == 0
    output = capfd.readouterr().out
    settings, _, rest = output.partition("\n}\n")
    assert json.loads(settings + "}")["optimizer"]["warmup"] == 7
    assert not run.exists()
    teacher, trained = (
        int(x.replace(",", "")) for x in re.search(r"teacher ([\d,]+), trained ([\d,]+): ", rest).groups()
    )
    memory = dict(re.findall(r"^  (\S.*\S) +([\d.]+) GiB$", rest, re.M))
    gib = {name: float(size) * 2**30 for name, size in memory.items()}
    tolerance = 0.0006 * 2**30
    assert gib["base"] == pytest.approx(4 * teacher, abs=tolerance)  # float32
    assert gib["optimizer"] == pytest.approx(8 * trained, abs=tolerance)  # two moments
    for name in ("adapter", "EMA weights", "gradients"):
        assert gib[name] == pytest.approx(4 * trained, abs=tolerance)
    assert gib["total"] == pytest.approx(sum(gib.values()) - gib["total"], abs=4 * tolerance)
    assert "data 1, fsdp 1, tensor 1, sequence 1" in rest

    assert exit_code(["train", "--dry-run", "--config", TINY, *changed, "--config.embeddings=cached"]) == 0
    cached = dict(re.findall(r"^  (\S.*\S) +([\d.]+) GiB$", capfd.readouterr().out, re.M))
    assert memory.keys() - cached.keys() == {"text encoders"}
    assert float(cached["total"]) == pytest.approx(float(memory["total"]) - float(memory["text encoders"]), abs=0.002)
