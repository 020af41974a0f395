"""Checkpoints whose save is killed, that are damaged, or find no room on the disk."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from orbax.checkpoint._src.serialization import jax_array_handlers, serialization

from arcflow_jax.arrays.orbax import clear_cause
from arcflow_jax.arrays.writer import Stream, write_checkpoint
from arcflow_jax.checkpoints.training import Checkpoints
from arcflow_jax.errors import UserError, exit_code
from arcflow_jax.networks.layers import Adapter
from arcflow_jax.storage.bucket import BucketPath
from arcflow_jax.storage.paths import as_path
from arcflow_jax.training.state import Skipped, TrainState
from tests.helpers.buckets import bucket
from tests.helpers.full_disk import disk_for_files_up_to
from tests.helpers.processes import child

# Unfinished reads and writes would report to a closed event loop
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


def state(step: int, size: int = 4) -> TrainState:
    """A small state that no other step has."""
    adapter = nnx.State({"a": Adapter(jnp.arange(size) + 10.0 * step, axes=(None,))})
    whole = TrainState.create(adapter, optax.adam(0.1))
    return dataclasses.replace(whole, step=jnp.int32(step), skipped=Skipped(jnp.int32(step + 1), jnp.int32(0)))


def save(checkpoints: Checkpoints, state: TrainState) -> None:
    checkpoints.save(int(state.step), state.items())


def restore(checkpoints: Checkpoints, like: TrainState, step: int | None = None) -> TrainState:
    return TrainState.from_items(checkpoints.restore(like.items(), step))


def assert_is(one: TrainState, two: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_what_is_kept(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, keep_every=4) as checkpoints:
        for step in range(2, 12):
            save(checkpoints, state(step))
    assert sorted(map(int, os.listdir(tmp_path / "checkpoints"))) == [4, 8, 10, 11]


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from tests.checkpoints.test_training_checkpoints import Checkpoints, save, state
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    save(checkpoints, state(1))
def kill(event, arguments):  # all is written, and would now get its name
    if event == "os.rename" and Path(arguments[1]).name == "2":
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    save(checkpoints, state(2))
"""


def test_kill_while_saving_leaves_the_one_before(tmp_path):
    killed = child(KILLED_WHILE_SAVING, tmp_path)
    output, _ = killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL, output
    assert len(os.listdir(tmp_path / "checkpoints")) == 2  # the remains of the second are there
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert_is(restore(checkpoints, state(0)), state(1))
    assert len(os.listdir(tmp_path / "checkpoints")) == 2  # who reads does not clear up
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(restore(checkpoints, state(0)), state(1))
        save(checkpoints, state(2))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(restore(checkpoints, state(0)), state(2))


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
            save(checkpoints, state(step, size=4000))
    damage(tmp_path / "checkpoints" / "6", how)
    like = state(0, size=4000)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"^checkpoint 6 in .* is damaged; arcflow train --step 3 resumes from"):
            restore(checkpoints, like)
        with pytest.raises(UserError, match="has no checkpoint 5; there are 3, 6"):
            restore(checkpoints, like, 5)
        assert checkpoints.latest == 6
        assert_is(restore(checkpoints, like, 3), state(3, size=4000))
        assert checkpoints.latest == 3
        assert os.listdir(tmp_path / "checkpoints-aside") == ["6"]
        save(checkpoints, state(6, size=4000))
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(restore(checkpoints, like, 3), state(3, size=4000))
        assert sorted(os.listdir(tmp_path / "checkpoints-aside")) == ["6", "6-2"]
        save(checkpoints, state(6, size=4000))
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(restore(checkpoints, like), state(6, size=4000))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), "no permission to read checkpoint 6 in "),
        (ValueError("PERMISSION_DENIED: HTTP response code: 403"), "no permission to read checkpoint 6 in "),
        (
            ValueError("UNAVAILABLE: CURL error Could not resolve host"),
            "checkpoint 6 in .* cannot be reached, try again",
        ),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory"), "out of memory while checkpoint 6 in "),
    ],
)
def test_only_a_damaged_checkpoint_advises_another(tmp_path, monkeypatch, error, message):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (3, 6):
            save(checkpoints, state(step))
    with Checkpoints(tmp_path) as checkpoints:

        def fail(*args: object, **settings: object) -> None:
            raise RuntimeError("while reading") from error

        monkeypatch.setattr(checkpoints.manager, "restore", fail)
        with pytest.raises(UserError, match=f"^{message}") as caught:
            restore(checkpoints, state(0))
    assert "--step" not in str(caught.value)
    assert exit_code(caught.value) == (1 if "UNAVAILABLE" in str(error) else 2)


def test_a_run_without_checkpoints_has_none_to_resume_from(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=r"has no checkpoint 5; there are none$"):
        restore(checkpoints, state(0), 5)


def test_a_checkpoint_of_other_shapes_does_not_fit(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (3, 6):
            save(checkpoints, state(step, size=4000))
    with Checkpoints(tmp_path) as checkpoints:
        message = r"checkpoint 6 in .* does not fit .*: \d+ arrays differ \(.*\(4000,\) there, \(3000,\) here"
        with pytest.raises(UserError, match=message) as caught:
            restore(checkpoints, state(0, size=3000))
    assert "--step" not in str(caught.value)


def fill_up(run: Path, size: int, when: str) -> None:
    with Checkpoints(run) as checkpoints:
        save(checkpoints, state(2, size))  # fails in the background
        if when == "at the next save":
            save(checkpoints, state(3, size))
        if when == "when asked":
            for _ in range(1000):
                checkpoints.check()
                time.sleep(0.01)
            pytest.fail("no check has found the failed save")


@pytest.mark.parametrize("when", ["at the next save", "at the end", "when asked"])
def test_full_disk_is_reported_in_one_line_and_leaves_older_checkpoints(tmp_path, when, capfd):
    size = 100_000
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state(1, size))
    message = r"^cannot write a checkpoint to .*; checkpoint 1 is intact: [^\n]*$"
    with disk_for_files_up_to(4096), pytest.raises(UserError, match=message):
        fill_up(tmp_path, size, when)
    assert capfd.readouterr().err == ""
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(restore(checkpoints, state(0, size)), state(1, size))


def test_full_disk_is_called_by_its_name(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state(1))
    with Checkpoints(tmp_path) as checkpoints:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(checkpoints.manager, "save", lambda *a, **k: (_ for _ in ()).throw(full))
        with pytest.raises(UserError, match=r"; checkpoint 1 is intact: No space left on device$"):
            save(checkpoints, state(2))


def hooks() -> tuple[object, list[object]]:
    return sys.unraisablehook, list(logging.getLogger("absl").filters)


def test_saving_and_restoring_leave_no_global_hook(tmp_path, caplog):
    before = hooks()
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state(1))
    assert hooks() == before
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert hooks() == before
        assert_is(restore(checkpoints, state(0)), state(1))
    assert hooks() == before
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_other_messages_of_orbax_are_logged_while_a_run_is_saved(tmp_path, caplog):
    logger = logging.getLogger("absl")
    failed = ValueError("failed"), None
    names = ("future.py", "storage_backend.py")

    def log(name: str, level: int, error: object = (ValueError, *failed)) -> None:
        path = os.path.join("site-packages", "orbax", "checkpoint", name)
        logger.handle(logging.LogRecord("absl", level, path, 1, f"{name} {level}", (), error))

    with Checkpoints(tmp_path), caplog.at_level(logging.INFO, "absl"):
        for name in names:
            log(name, logging.ERROR)
        log("future.py", logging.ERROR, None)
        log("future.py", logging.WARNING)
    messages = [record.message for record in caplog.records if "orbax" in record.pathname]
    assert [name for name in messages if name.endswith(("40", "30"))] == [
        f"storage_backend.py {logging.ERROR}",
        f"future.py {logging.ERROR}",  # without a traceback, so not the error that is raised
        f"future.py {logging.WARNING}",
    ]


def test_checkpoint_with_the_names_of_the_first_version_is_restored(tmp_path):
    """The backbone was called `trunk`, and there were no checksums."""
    adapter = nnx.State(
        {
            "backbone": {"blocks": {"lora": {"a": Adapter(jnp.arange(3.0), axes=(None,))}}},
            "head": {"bias": Adapter(jnp.ones(2), axes=(None,))},
        }
    )
    whole = dataclasses.replace(TrainState.create(adapter, optax.adam(0.1)), step=jnp.int32(7))

    def old(x: object) -> object:
        if not isinstance(x, nnx.State):
            return x
        pure = nnx.to_pure_dict(x)
        return {"trunk": pure["backbone"], "head": pure["head"]}

    tree = jax.tree.map(old, whole.items(), is_leaf=lambda x: isinstance(x, nnx.State))
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(7, args=ocp.args.PyTreeSave(tree))
    blank = jax.tree.map(jnp.zeros_like, whole)
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(restore(checkpoints, blank), whole)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_adapter(blank.ema), whole.ema)


def test_a_failed_save_ends_when_all_its_writes_have_ended(tmp_path, monkeypatch, caplog):
    """Orbax writes the shardings and the arrays in two threads, and raises the first error at once."""

    async def fail(*args: object, **settings: object) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    ended: list[bool] = []
    write = serialization.async_serialize_from_host

    async def write_slowly(*args: object, **settings: object) -> None:
        await asyncio.sleep(1)
        await write(*args, **settings)
        ended.append(True)

    monkeypatch.setattr(jax_array_handlers, "_async_serialize_shardings", fail)
    monkeypatch.setattr(serialization, "async_serialize_from_host", write_slowly)
    refused = pytest.raises(UserError, match=r"cannot write a checkpoint to .*: File too large")
    with refused, Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state(1))
    assert ended
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_checkpoints_on_s3():
    """Which Orbax does not know by itself; on gs:// see tests/test_buckets.py."""
    pytest.importorskip("moto")
    with bucket("s3") as url:
        run = as_path(f"{url}/run")
        with Checkpoints(run, keep_last=2) as checkpoints:
            for step in (1, 2, 3):
                save(checkpoints, state(step))
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["2", "3"]
        (run / "checkpoints" / "3" / "commit_success.txt").unlink()  # as if the save had been killed
        with Checkpoints(run) as checkpoints:
            assert checkpoints.latest == 2
            assert_is(restore(checkpoints, state(0)), state(2))
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["2"]


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_newer_checkpoints_move_aside_in_a_bucket(scheme, monkeypatch):
    pytest.importorskip({"gs": "gcp_storage_emulator", "s3": "moto"}[scheme])
    with bucket(scheme) as url:
        run = as_path(f"{url}/run")
        with Checkpoints(run, keep_last=3) as checkpoints:
            for step in (1, 2, 3):
                save(checkpoints, state(step))
        with monkeypatch.context() as patched, Checkpoints(run, keep_last=3) as checkpoints:
            like = state(0)
            for name in ("read_bytes", "write_bytes"):  # the store copies, not this machine
                patched.delattr(type(run), name)
            assert_is(restore(checkpoints, like, 1), state(1))
            assert checkpoints.latest == 1
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["1"]
        assert [path.name for path in (run / "checkpoints-aside").iterdir()] == ["2", "3"]
        for step in ("2", "3"):  # by hand, as a user would
            for path in (run / "checkpoints-aside" / step).rglob("*"):
                path.copy_to(run / "checkpoints" / step / str(path.relative_to(run / "checkpoints-aside" / step)))
        with Checkpoints(run) as checkpoints:
            assert_is(restore(checkpoints, like), state(3))


@pytest.mark.long
def test_checkpoints_in_a_store_that_refuses_every_third_request():
    pytest.importorskip("gcp_storage_emulator")
    with bucket("gs", "busy") as url:
        run = as_path(f"{url}/run")
        with Checkpoints(run) as checkpoints:
            save(checkpoints, state(1))
            save(checkpoints, state(2))
        with Checkpoints(run) as checkpoints:
            assert_is(restore(checkpoints, state(0), 1), state(1))
        assert [path.name for path in (run / "checkpoints-aside").iterdir()] == ["2"]


def test_a_bucket_that_takes_no_weights_is_named_with_the_permission():
    """TensorStore has a client and an account of its own."""
    pytest.importorskip("gcp_storage_emulator")
    denied = "this account may not write to bucket bucket: it needs storage.objects.create and storage.objects.delete"
    with bucket("gs", "sealed") as url:
        refused = pytest.raises(UserError, match=rf"^cannot write a checkpoint to {url}/run: {denied} \(")
        with refused as caught, Checkpoints(as_path(f"{url}/run")) as checkpoints:
            save(checkpoints, state(1))
        assert exit_code(caught.value) == 2
        stream = Stream((2,), np.dtype(np.float32), False, lambda: iter([np.ones(2, np.float32)]))
        with pytest.raises(PermissionError, match=denied):
            write_checkpoint(as_path(f"{url}/model/state"), {"a": stream})
    told = clear_cause(ValueError("PERMISSION_DENIED: HTTP response code: 403"), as_path("s3://b/run"))
    assert str(told).startswith("this account may not read bucket b: it needs s3:GetObject and s3:ListBucket (")


def test_a_bucket_that_stops_to_answer_is_told_as_such(monkeypatch):
    """Nor can it be asked which checkpoints are complete."""
    pytest.importorskip("gcp_storage_emulator")

    def no_answer(*args: object, **settings: object) -> None:
        raise ConnectionError(errno.EIO, "bucket bucket does not answer, try again")

    with bucket("gs") as url, monkeypatch.context() as patched:
        refused = pytest.raises(UserError, match=rf"^cannot write a checkpoint to {url}/run: bucket bucket does not")
        with refused as caught, Checkpoints(as_path(f"{url}/run")) as checkpoints:
            patched.setattr(checkpoints.manager, "save", no_answer)
            patched.setattr(BucketPath, "info", no_answer)
            save(checkpoints, state(1))
    assert exit_code(caught.value) == 1


def test_a_file_that_no_memory_holds_is_refused(tmp_path):
    """TensorStore would end the process."""
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state(1))
    file = tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA"
    os.truncate(file, 2**40)
    with pytest.raises(
        UserError, match=r"_CHECKPOINT_METADATA has 1099511627776 bytes, but at most 68719476736 are read"
    ):
        Checkpoints(tmp_path, read_only=True).restore_adapter(state(1).ema)


def test_a_pipe_among_the_checkpoints_is_refused(tmp_path):
    """Orbax would wait for somebody to write into it."""
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state(1))
    file = tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA"
    file.unlink()
    os.mkfifo(file)
    for read_only in (True, False):
        with pytest.raises(UserError, match=r"_CHECKPOINT_METADATA is not a regular file"):
            Checkpoints(tmp_path, read_only=read_only)
