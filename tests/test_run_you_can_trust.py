"""Runs that are killed, told to end, run out of disk, diverge or find a damaged checkpoint; and what they log."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from full_disk import disk_for_files_up_to
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from arcflow_jax import train as train_module
from arcflow_jax.checkpoint import Checkpoints
from arcflow_jax.cli import main
from arcflow_jax.config import Recipe, read_config
from arcflow_jax.conversion import convert_model
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.layers import Adapter
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.run_log import RunLog
from arcflow_jax.train import Plan, train
from arcflow_jax.train_state import Skipped, TrainState

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.py")
PROMPTS = ["a red circle", "a green square", "a blue ring on the left", "a large yellow triangle"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return convert_model(ASSETS / "tiny-flux", tmp_path_factory.mktemp("model") / "teacher")


def overrides(model: Path, out: Path, **changes: object) -> list[str]:
    """The tiny recipe, cut down to iterations of a fraction of a second."""
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    values = {
        **{"model": model, "prompts": prompts, "out": out, "height": 32, "width": 32, "batch": 4, "steps": 4},
        **{"log_every": 1, "save_every": 10, "mesh": (1, 1, 1, 1), "preview_every": 0},
        **{"adapter.modes": 3, "adapter.rank": 2, "adapter.dropout": 0.1},
        **{"distillation.decay": 1000, "distillation.states": 2, "ema.start": 0},
        **changes,
    }
    return [f"--config.{name}={value}" for name, value in values.items()]


def recipe(model: Path, out: Path, **changes: object) -> Recipe:
    return Recipe.of(read_config(TINY, overrides(model, out, **changes)))


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def saved(run: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint."""
    with Checkpoints(run, read_only=True) as checkpoints:
        restored = checkpoints.manager.restore(checkpoints.latest)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(restored)}


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


def child(script: str, *arguments: object) -> subprocess.Popen:
    """A Python process that can import this file."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


KILLED_AT_13 = """
import os, signal, sys, time
from pathlib import Path
from test_run_you_can_trust import RunLog, recipe, train
model, out = map(Path, sys.argv[1:])
iteration = RunLog.iteration
def killing(log, step, values):
    line = iteration(log, step, values)
    if step == 13:
        while not (out / "checkpoints" / "10").exists():  # saving goes on in the background
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return line
RunLog.iteration = killing
train(recipe(model, out, steps=20))
"""


def test_kill_and_resume_is_bit_identical(model, tmp_path):
    killed = child(KILLED_AT_13, model, tmp_path / "killed")
    straight = train(recipe(model, tmp_path / "straight", steps=20))
    output, _ = killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL, output
    assert [line["step"] for line in log(tmp_path / "killed")] == list(range(1, 14))
    with open(tmp_path / "killed" / "log.jsonl", "a") as file:
        file.write('{"step": 14, "lo')  # as a kill may leave it
    resumed = train(recipe(model, tmp_path / "killed", steps=20))
    assert_same(saved(straight), saved(resumed))
    timings = ("time", "iterations_per_second")
    lines = [[{name: x for name, x in line.items() if name not in timings} for line in log(run)]
             for run in (straight, resumed)]  # fmt: skip
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == list(range(1, 21))
    shown = [[(e.step, v.tag) for e in events(run) for v in e.summary.value if v.tag == "loss"]
             for run in (straight, resumed)]  # fmt: skip
    assert shown[0] == shown[1] == [(step, "loss") for step in range(1, 21)]

    # what is left can be sampled from, averaged or not
    sampled = [ArcFlowPipeline.from_pretrained(model, straight, raw=raw)(PROMPTS[:1], height=32, width=32, seed=3)
               for raw in (False, True)]  # fmt: skip
    assert np.any(np.asarray(sampled[0][0]) != np.asarray(sampled[1][0]))


def test_told_to_end_saves_and_exits_with_0(model, tmp_path, monkeypatch, capfd):
    iteration = RunLog.iteration

    def telling(self, step, values):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return iteration(self, step, values)

    monkeypatch.setattr(RunLog, "iteration", telling)
    before = signal.getsignal(signal.SIGTERM)
    assert exit_code(["train", "--config", TINY, *overrides(model, tmp_path / "run")]) == 0
    assert "told to end" in capfd.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["2"]
    monkeypatch.setattr(RunLog, "iteration", iteration)
    train(recipe(model, tmp_path / "run"))
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3, 4]


def exit_code(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as exit:
        return exit.code or 0
    return 0


TWO_PROCESSES = """
import sys, time
import jax
from arcflow_jax.preemption import Preemption
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
with Preemption() as preemption:
    for step in range(1, 3000):
        print(step, flush=True)
        if preemption.reached(step):
            break
        time.sleep(0.02 if sys.argv[2] == "0" else 0.03)
"""


def test_two_processes_end_at_the_same_iteration():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [child(TWO_PROCESSES, address, index) for index in range(2)]
    assert both[1].stdout.readline() == "1\n"
    both[1].send_signal(signal.SIGTERM)  # one of them is told
    ends = [process.communicate(timeout=300)[0].split()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert ends[0] == ends[1]
    assert int(ends[0]) < 2999


def state(step: int, size: int = 4) -> TrainState:
    """A small state that no other step has."""
    adapter = nnx.State({"a": Adapter(jnp.arange(size) + 10.0 * step, axes=(None,))})
    whole = TrainState.create(adapter, optax.adam(0.1))
    return dataclasses.replace(whole, step=jnp.int32(step), skipped=Skipped(jnp.int32(step + 1), jnp.int32(0)))


def assert_is(one: TrainState, two: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_what_is_kept(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, keep_every=4) as checkpoints:
        for step in range(2, 12):
            checkpoints.save(state(step))
    assert sorted(map(int, os.listdir(tmp_path / "checkpoints"))) == [4, 8, 10, 11]


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from test_run_you_can_trust import Checkpoints, state
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    checkpoints.save(state(1))
def kill(event, arguments):  # all is written, and would now get its name
    if event == "os.rename" and Path(arguments[1]).name == "2":
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    checkpoints.save(state(2))
"""


def test_kill_while_saving_leaves_the_one_before(tmp_path):
    killed = child(KILLED_WHILE_SAVING, tmp_path)
    output, _ = killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL, output
    assert len(os.listdir(tmp_path / "checkpoints")) == 2  # the remains of the second are there
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert_is(checkpoints.restore(state(0)), state(1))
    assert len(os.listdir(tmp_path / "checkpoints")) == 2  # who reads does not clear up
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(checkpoints.restore(state(0)), state(1))
        checkpoints.save(state(2))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(checkpoints.restore(state(0)), state(2))


def damage(checkpoint: Path, how: str) -> None:
    """Spoils the largest file, which has the numbers."""
    file = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    if how == "one bit":
        data[len(data) // 2] ^= 1
    file.write_bytes(data if how == "one bit" else data[: len(data) // 2])


@pytest.mark.parametrize("how", ["one bit", "truncated"])
def test_damaged_checkpoint_is_named_and_the_one_before_taken_when_asked(tmp_path, how):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (3, 6):
            checkpoints.save(state(step, size=4000))
    damage(tmp_path / "checkpoints" / "6", how)
    like = state(0, size=4000)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"^checkpoint 6 in .* is damaged; arcflow train --step 3 goes on from"):
            checkpoints.restore(like)
        with pytest.raises(UserError, match="has no checkpoint 5; there are 3, 6"):
            checkpoints.restore(like, 5)
        assert checkpoints.latest == 6
        assert_is(checkpoints.restore(like, 3), state(3, size=4000))
        assert checkpoints.latest == 3
        checkpoints.save(state(6, size=4000))
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(checkpoints.restore(like), state(6, size=4000))


def fill_up(run: Path, size: int, when: str) -> None:
    with Checkpoints(run) as checkpoints:
        checkpoints.save(state(2, size))  # fails in the background
        if when == "at the next save":
            checkpoints.save(state(3, size))
        if when == "when asked":
            for _ in range(1000):
                checkpoints.check()
                time.sleep(0.01)


@pytest.mark.parametrize("when", ["at the next save", "at the end", "when asked"])
def test_full_disk_is_told_in_one_line_and_leaves_older_checkpoints(tmp_path, when, capfd):
    size = 100_000
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1, size))
    message = r"^cannot write a checkpoint to .*; checkpoint 1 is intact: [^\n]*$"
    with disk_for_files_up_to(4096), pytest.raises(UserError, match=message):
        fill_up(tmp_path, size, when)
    assert capfd.readouterr().err == ""
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(checkpoints.restore(state(0, size)), state(1, size))


def test_full_disk_is_called_by_its_name(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1))
    with Checkpoints(tmp_path) as checkpoints:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(checkpoints.manager, "save", lambda *a, **k: (_ for _ in ()).throw(full))
        with pytest.raises(UserError, match=r"; checkpoint 1 is intact: no space left on the device$"):
            checkpoints.save(state(2))


def test_full_disk_under_the_log(model, tmp_path, capfd):
    run = tmp_path / "run"
    run.mkdir()
    (run / "wandb.json").write_text("{}")
    limited = disk_for_files_up_to(0)
    with (
        limited,
        pytest.raises(UserError, match=r"^cannot write to .*/run, its checkpoints are intact: File too large$"),
    ):
        RunLog(run, recipe(model, run), 0)
    assert capfd.readouterr().err == ""


def poison(monkeypatch, iterations: set[int]) -> None:
    """Makes the guidance of some iterations, counted from 1, NaN, and with it loss and gradient."""
    real = train_module.PROMPTS["FluxPipeline"]

    def prompts(*arguments: object) -> object:
        encode, seen = real(*arguments), iter(range(1, 1000))

        def encoded(batch, **settings):
            conditioning = encode(batch, **settings)
            if next(seen) in iterations:
                return dataclasses.replace(conditioning, guidance=conditioning.guidance * jnp.nan)
            return conditioning

        return encoded

    monkeypatch.setitem(train_module.PROMPTS, "FluxPipeline", prompts)


def test_iterations_that_are_not_finite_are_skipped(model, tmp_path, monkeypatch):
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


def test_too_many_in_a_row_stop_the_run(model, tmp_path, monkeypatch, capfd):
    poison(monkeypatch, set(range(2, 100)))
    arguments = overrides(model, tmp_path / "run", steps=90, max_skipped=2)
    assert exit_code(["train", "--config", TINY, *arguments]) == 2
    error = capfd.readouterr().err
    assert re.fullmatch(r"error: stopped: the loss or gradient of the last 3 iterations was not finite; .*\n", error)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["4"]


def test_other_settings_are_named(model, tmp_path):
    train(recipe(model, tmp_path / "run", steps=0))
    with pytest.raises(
        UserError, match=r"other settings: optimizer.learning_rate was 0.002, not 0.1, seed was 0, not 1;"
    ):
        train(recipe(model, tmp_path / "run", **{"seed": 1, "optimizer.learning_rate": 0.1}))
    train(recipe(model, tmp_path / "run", steps=0, log_every=7))  # which decides nothing
    assert json.loads((tmp_path / "run" / "config.json").read_text())["log_every"] == 7


class FakeWandb(types.ModuleType):
    """What the run calls of Weights & Biases, which is not installed where tests run."""

    def __init__(self):
        super().__init__("wandb")
        self.started: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.__spec__ = types.SimpleNamespace()
        self.Image = lambda image: image.size

    def init(self, **settings):
        self.started.append(settings)
        return types.SimpleNamespace(log=lambda values, step: self.logged.append((step, values)), finish=lambda: None)


def test_pictures_trace_and_weights_and_biases(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    run = tmp_path / "run"
    shown = recipe(model, run, steps=2, preview_every=2, preview_prompts=("a red circle", "a ring"), wandb_project="w")
    train(shown, profile="2:2")

    with Image.open(run / "previews" / "000002.png") as image:
        sheet = np.asarray(image.convert("RGB"), np.int32)
    # rows under a line of names, each under its prompt; pictures of 32 pixels are drawn six times as large
    teacher, raw, averaged = (
        np.stack([sheet[40 + 212 * row :, 196 * column :][:192:6, :192:6] for row in range(2)]) for column in range(3)
    )
    assert sheet.shape == (20 + 2 * 212, 3 * 196 - 4, 3)
    assert (sheet[:20] < 128).any()
    assert (sheet[20:40] < 128).any()
    for one, two in ((teacher[0], teacher[1]), (teacher, raw), (raw, averaged)):
        assert np.any(one != two)
    straight = ArcFlowPipeline.from_pretrained(model)
    expected = straight(["a red circle", "a ring"], height=32, width=32, seed=0, guidance=shown.guidance, batch_size=2)
    np.testing.assert_allclose(teacher, np.stack([np.asarray(each, np.int32) for each in expected]), atol=1)
    for raw_weights, there in ((True, raw), (False, averaged)):
        student = ArcFlowPipeline.from_pretrained(model, run, raw=raw_weights)
        expected = student(["a red circle", "a ring"], height=32, width=32, seed=0, batch_size=2)
        np.testing.assert_allclose(there, np.stack([np.asarray(each, np.int32) for each in expected]), atol=2)

    tags = {value.tag for event in events(run) for value in event.summary.value}
    assert {"loss", "segment_loss/1", "gradient_norm", "teacher_share", "preview"} <= tags
    assert list((run / "profile").rglob("*.xplane.pb"))
    output = capfd.readouterr().out
    assert re.search(r"trains 0\.\d+ of \d\.\d+ million parameters \(\d+\.\d+ %\) on 1 \w+ devices", output)
    assert re.search(
        r"iteration 2 of 2: loss [\d.]+ \(segments [\d.]+ [\d.]+\), gradient \S+, rate 0.0002, teacher 100 %, "
        r"[\d.]+ it/s, 0:00:00 left",
        output,
    )
    assert [step for step, _ in wandb.logged] == [1, 2, 2]
    assert wandb.logged[-1][1]["preview"] == (3 * 196 - 4, 20 + 2 * 212)

    train(dataclasses.replace(shown, steps=2))
    assert [each["id"] for each in wandb.started] == [wandb.started[0]["id"]] * 2
    with pytest.raises(UserError, match=r"profile 1:2: this run makes iterations 3 to 2, and no others"):
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
    for name in ("adapter", "average", "gradients"):
        assert gib[name] == pytest.approx(4 * trained, abs=tolerance)
    assert gib["together"] == pytest.approx(sum(gib.values()) - gib["together"], abs=4 * tolerance)
    assert "data 1, fsdp 1, tensor 1, sequence 1" in rest


def test_weights_and_biases_that_is_not_there(model, tmp_path):
    if "wandb" in sys.modules:
        pytest.skip("it is installed")
    with pytest.raises(UserError, match="pip install wandb"):
        Plan.of(recipe(model, tmp_path / "run", wandb_project="w"))
