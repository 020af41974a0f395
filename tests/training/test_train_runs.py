"""Runs that are killed, preempted, diverge or fill the disk; what they log, draw and trace."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import re
import shutil
import signal
import struct
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from arcflow_jax import families
from arcflow_jax.checkpoints.training import Checkpoints
from arcflow_jax.cli.app import main
from arcflow_jax.errors import UserError
from arcflow_jax.families import flux
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training import compile, plan, state
from arcflow_jax.training.log import RunLog
from arcflow_jax.training.loop import train
from arcflow_jax.training.optimizer import make_optimizer
from arcflow_jax.training.preview import Preview
from arcflow_jax.training.recipe import Recipe, read_config
from tests.helpers.full_disk import disk_for_files_up_to
from tests.helpers.processes import child
from tests.helpers.tiny_run import PROMPTS, saved

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.py")


@pytest.fixture(scope="module")
def model(tiny_flux, tmp_path_factory) -> Path:
    return shutil.copytree(tiny_flux, tmp_path_factory.mktemp("model") / "teacher")


def overrides(model: Path, out: Path, **changes: object) -> list[str]:
    """The tiny recipe, cut down to training steps of a fraction of a second."""
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    values = {
        **{"model": model, "prompts": prompts, "out": out, "resolutions": ((32, 32),), "batch": 4, "steps": 4},
        **{"log_every": 1, "save_every": 10, "mesh": (1, 1, 1, 1), "preview_every": 0},
        **{"adapter.modes": 3, "adapter.rank": 2, "adapter.dropout": 0.1},
        **{"distillation.decay": 1000, "distillation.states": 2, "optimizer.learning_rate": 2e-3, "ema.start": 0},
        **changes,
    }
    return [f"--config.{name}={value}" for name, value in values.items()]


def recipe(model: Path, out: Path, **changes: object) -> Recipe:
    return Recipe.from_config(read_config(TINY, overrides(model, out, **changes)))


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def events(run: Path) -> list[Event]:
    """What TensorBoard shows: all events, without those that a later start takes back."""
    kept: list[Event] = []
    for path in sorted((run / "tensorboard").iterdir(), key=lambda path: int(path.suffix[1:])):
        data, position = path.read_bytes(), 0
        while position + 12 <= len(data):
            (size,) = struct.unpack_from("<Q", data, position)
            event = Event.FromString(data[position + 12 : position + 12 + size])
            if event.session_log.status == SessionLog.START:
                kept = [other for other in kept if other.step < event.step]
            kept.append(event)
            position += 16 + size
    return kept


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
    """A run on prompts of two image sizes."""
    prompts = out.parent / "prompts.jsonl"
    lines = [{"prompt": text, "height": 32, "width": 32 + 16 * (i % 2)} for i, text in enumerate(PROMPTS)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    changes = {"prompts": prompts, "steps": 10, "save_every": 5}
    return recipe(model, out, **changes)


@pytest.mark.slow
def test_kill_and_resume_is_bit_identical(model, tmp_path):
    straight = train(bucketed(model, tmp_path / "straight"))
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
    arguments = overrides(model, tmp_path / "run", **{"distillation.decay": 3})
    assert exit_code(["train", "--config", TINY, *arguments]) == 143
    message = f"preempted: checkpoint at step 2 of 4 written to {tmp_path / 'run'}; run the same command to resume\n"
    assert capfd.readouterr().out.endswith(message)
    assert signal.getsignal(signal.SIGTERM) == before
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["2"]
    monkeypatch.setattr(RunLog, "step", log_step)
    changes = {"distillation.decay": 3}
    resumed = train(recipe(model, tmp_path / "run", **changes))
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
    changes = {"steps": 90, "max_skipped": 2, "optimizer.learning_rate": 1e-3}  # no other test has compiled this
    arguments = overrides(model, tmp_path / "run", **changes)
    assert exit_code(["train", "--config", TINY, *arguments]) == 2
    error = capfd.readouterr().err
    assert re.fullmatch(r"error: stopped: loss, gradient or update of the last 3 training steps was .*\n", error)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["3"]
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


class FakeWandb(types.ModuleType):
    """What the run calls of Weights & Biases, which is not installed where tests run, as its documentation has it.

    A run is known by its id. Its own step counts up, in a resumed run too; what is logged to an earlier one is dropped.
    A metric is drawn over that step, or over another metric of the same call, as `define_metric` says.
    """

    def __init__(self):
        super().__init__("wandb")
        self.runs: dict[str, FakeWandb.Run] = {}
        self.__spec__ = types.SimpleNamespace()
        self.Image = lambda image: image.size

    def init(self, *, project: str, name: str, id: str, resume: str, dir: str, config: dict) -> FakeWandb.Run:
        assert resume == "allow"
        run = self.runs.setdefault(id, FakeWandb.Run())
        run.open = True
        return run

    class Run:
        def __init__(self):
            self.open, self.own_step, self.x = False, 0, {}
            self.drawn: list[tuple[str, int, object]] = []  # metric, where, value
            self.summary: dict[str, object] = {}  # the last value of each

        def define_metric(self, name: str, *, step_metric: str) -> None:
            self.x[name] = step_metric

        def log(self, data: dict, step: int | None = None) -> None:
            assert self.open, "log after finish"
            if step is not None and step < self.own_step:
                return  # dropped, with a warning
            self.own_step = self.own_step + 1 if step is None else step
            self.summary |= data
            for name, value in data.items():
                over = next((x for pattern, x in self.x.items() if fnmatch.fnmatchcase(name, pattern)), None)
                if over is None or over in data:
                    self.drawn.append((name, self.own_step if over is None else data[over], value))

        def finish(self) -> None:
            self.open = False

        def steps(self, name: str) -> list[int]:
            return [step for metric, step, _ in self.drawn if metric == name]


def test_weights_and_biases_of_a_resumed_run(model, tmp_path, monkeypatch):
    """What is trained again after a checkpoint arrives, though Weights & Biases has seen later steps."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    values = {name: jnp.ones(()) for name in ("loss", "gradient_norm", "learning_rate", "teacher_share", "skipped")}
    values |= {"segment_loss": jnp.ones(2), "skipped_in_row": jnp.zeros(())}
    run = tmp_path / "run"
    run.mkdir()
    logged = recipe(model, run, wandb_project="w")
    for done, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        with RunLog(run, logged, done) as log:
            for step in steps:
                log.step(step, values)
            log.image(steps[-1], Image.new("RGB", (8, 8)))
    (project,) = wandb.runs.values()
    assert project.steps("loss") == [1, 2, 3, 2, 3, 4]
    assert project.steps("preview") == [3, 4]


def test_weights_and_biases_gets_all_lines_though_it_fails(model, tmp_path, monkeypatch, capfd):
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
    logged = recipe(model, run, wandb_project="w")
    with RunLog(run, logged, 0) as log:
        for step in (1, 2, 3):
            down[:] = [1] if step == 2 else []
            log.step(step, values)
        down.append(1)
        log.step(4, values)  # and no more, as if killed
    assert "warning: Weights & Biases: ConnectionError: no service" in capfd.readouterr().err
    (project,) = wandb.runs.values()
    assert project.steps("loss") == [1, 2, 3]
    down.clear()
    with RunLog(run, logged, 4) as log:
        log.step(5, values)
    assert project.steps("loss") == [1, 2, 3, 4, 5]


def test_what_is_optional_never_ends_a_run(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())

    def fail(*args: object, **settings: object) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr(wandb, "init", fail)
    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    monkeypatch.setattr(Preview, "sheet", fail)
    changes = {"preview_every": 2, "preview_prompts": ("a ring",), "wandb_project": "w", "steps": 2}
    run = train(recipe(model, tmp_path / "run", **changes), profile="1:2")
    assert [line["step"] for line in log(run)] == [1, 2]
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: no preview: RuntimeError: not today",
        "warning: Weights & Biases: RuntimeError: not today",
        "warning: the trace was not begun: RuntimeError: not today",
    ]


@pytest.mark.slow
def test_all_is_compiled_before_the_first_training_step(model, tmp_path, monkeypatch):
    """Both sizes, both phases and the preview; no training step compiles."""
    settings = bucketed(model, tmp_path / "run")
    settings = dataclasses.replace(settings, steps=8, save_every=8, preview_every=4, preview_prompts=("a ring",))
    settings = dataclasses.replace(
        settings,
        distillation=dataclasses.replace(settings.distillation, decay=4),
        optimizer=dataclasses.replace(settings.optimizer, learning_rate=3e-3),
    )
    compiled, at_step = [], []
    log_step = RunLog.step
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))

    def counting(self, step, values):
        at_step.append(sum("backend_compile" in name for name in compiled))
        return log_step(self, step, values)

    monkeypatch.setattr(RunLog, "step", counting)
    run = train(settings)
    assert at_step[0] >= 4  # the training steps, of a learning rate that no other test has
    assert at_step == [at_step[0]] * 8, at_step
    assert len({line["teacher_share"] > 0 for line in log(run)}) == 2
    assert (run / "previews" / "000008.png").exists()


def test_out_of_memory_is_told_before_the_first_training_step(model, tmp_path, monkeypatch):
    def full(*args: object, **settings: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(compile, "train_step", types.SimpleNamespace(trace=full))
    with pytest.raises(
        UserError, match=r"^out of memory in a training step of 4 image tokens: try a larger accumulate, "
    ):
        train(recipe(model, tmp_path / "run"))
    assert not log(tmp_path / "run")


@pytest.mark.slow
def test_previews_trace_and_weights_and_biases(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    run = tmp_path / "run"
    changes = {"preview_every": 2, "preview_prompts": ("a red circle", "a ring"), "wandb_project": "w"}
    changes |= {"optimizer.warmup": 0, "ema.power": 1.0}  # so that two steps show, and tell EMA weights from raw ones
    shown = recipe(model, run, steps=2, **changes)
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
    straight = ArcFlowPipeline.from_pretrained(model)
    expected = straight(
        ["a red circle", "a ring"], height=32, width=32, seed=0, guidance_scale=shown.guidance, batch_size=2
    ).images
    np.testing.assert_allclose(teacher, np.stack([np.asarray(each, np.int32) for each in expected]), atol=1)
    for raw_weights, there in ((True, raw), (False, ema)):
        student = ArcFlowPipeline.from_pretrained(model, run, raw=raw_weights)
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
def test_profile_that_is_none(model, tmp_path, text):
    with pytest.raises(UserError, match=re.escape(f"profile {text!r} is not A:B")):
        train(recipe(model, tmp_path / "run"), profile=text)


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


def test_weights_and_biases_that_is_not_there(model, tmp_path):
    if "wandb" in sys.modules:
        pytest.skip("it is installed")
    with pytest.raises(UserError, match="pip install wandb"):
        plan.Plan.make(recipe(model, tmp_path / "run", wandb_project="w"))
