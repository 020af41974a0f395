"""One writer an output: a second one is refused, waits, or takes over from a killed one."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from arcflow_jax.errors import UserError
from arcflow_jax.storage.lock import cut_to_bytes, is_writer, one_writer
from tests.helpers.processes import child

HOLD = """
import sys, time
from pathlib import Path
from arcflow_jax.storage.lock import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
COUNT = """
import sys
from pathlib import Path
from arcflow_jax.storage.lock import one_writer
file = Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with one_writer(file, wait=True):
        file.write_text(str(int(file.read_text()) + 1))
"""


@pytest.fixture
def held(tmp_path):
    """An output that another process writes, and that process."""
    process = child(HOLD, tmp_path / "out")
    assert process.stdout.readline() == "held\n"
    yield tmp_path / "out", process
    process.kill()
    process.communicate()


def write(out: Path, **options: bool) -> None:
    with one_writer(out, **options):
        pass


def test_the_lock_is_gone_at_the_end(tmp_path):
    out = tmp_path / "new" / "parent" / "out"
    assert not is_writer(out)
    with one_writer(out):
        assert [path.name for path in out.parent.iterdir()] == [".out.lock"]
        assert is_writer(out)
        assert is_writer(out / "part" / "of it")
        assert not is_writer(out.with_name("other"))
        with one_writer(out):  # the same thread again
            pass
        assert is_writer(out)
    assert not is_writer(out)
    assert not list(tmp_path.iterdir())
    with one_writer(out):
        out.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "parent", "out"]


def test_an_error_releases_the_lock(tmp_path):
    with pytest.raises(ValueError, match="wrong"), one_writer(tmp_path / "out"):
        raise ValueError("wrong")
    write(tmp_path / "out")


def test_a_second_process_is_refused_at_once(held, tmp_path):
    out, process = held
    (tmp_path / "way").symlink_to(tmp_path)
    for name in (out, tmp_path / "way" / "out", Path(os.path.relpath(out))):
        begun = time.monotonic()
        with pytest.raises(UserError) as caught:
            write(name)
        assert time.monotonic() - begun < 1
        assert re.fullmatch(
            rf"{out} is being written by process {process.pid} on {socket.gethostname()} since "
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d: wait for it, or name another",
            str(caught.value),
        )


def test_a_lock_whose_writer_has_not_yet_written_its_name(tmp_path):
    lock = tmp_path / ".out.lock"
    lock.touch()
    name = threading.Timer(0.3, lock.write_text, ["12\nfaraway\n"])
    name.start()
    with pytest.raises(UserError, match="out is being written by process 12 on faraway since"):
        write(tmp_path / "out")
    name.join()


def test_a_second_thread_is_refused(tmp_path):
    refused = []

    def try_it() -> None:
        try:
            write(tmp_path / "out")
        except UserError as error:
            refused.append(str(error))

    with one_writer(tmp_path / "out"):
        (thread := threading.Thread(target=try_it)).start()
        thread.join()
    assert "is being written by this process since" in refused[0]


def test_a_killed_writers_lock_is_taken_over(held):
    out, process = held
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert out.with_name(".out.lock").exists()
    write(out)
    assert not list(out.parent.iterdir())


def test_a_writer_on_another_host(tmp_path):
    lock = tmp_path / ".out.lock"
    lock.write_text("12\nfaraway\n")
    with pytest.raises(UserError, match=rf"by process 12 on faraway since .*: if that process is dead, remove {lock}"):
        write(tmp_path / "out")
    lock.unlink()
    write(tmp_path / "out")


@pytest.mark.parametrize("kind", ["link", "queue", "other file", "directory"])
def test_a_lock_that_is_none(tmp_path, kind):
    lock, secret = tmp_path / ".out.lock", tmp_path / "secret"
    secret.write_text("")
    make = {
        "link": lambda: lock.symlink_to(secret),
        "queue": lambda: os.mkfifo(lock),
        "other file": lambda: lock.write_text("notes"),
        "directory": lock.mkdir,
    }
    make[kind]()
    before = lock.lstat()
    with pytest.raises(UserError, match=rf"out is locked by {lock}, which names no process: remove it|cannot write"):
        write(tmp_path / "out")
    assert lock.lstat().st_ino == before.st_ino
    assert secret.read_text() == ""


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*/file/out: .*/file is not a directory"):
        write(tmp_path / "file" / "out")


def test_writers_that_wait_take_turns(tmp_path):
    (tmp_path / "count").write_text("0")
    processes = [child(COUNT, tmp_path / "count", 5) for _ in range(3)]
    for process in processes:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert (tmp_path / "count").read_text() == "15"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_cut_to_bytes():
    assert cut_to_bytes("aé", 2) == "a"  # not half a character
    assert cut_to_bytes("aé", 3) == "aé"
