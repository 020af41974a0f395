"""Paths in a bucket, with the real clients of both stores, against emulators."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import threading
import time

import msgspec
import numpy as np
import pytest
from PIL import Image

from arcflow_jax.data.images import read_image, read_images
from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.errors import UserError
from arcflow_jax.storage import bucket as bucket_module
from arcflow_jax.storage import lease
from arcflow_jax.storage.atomic import append, new_output, whole_directory, write_file
from arcflow_jax.storage.files import read_json, read_lines, write_json
from arcflow_jax.storage.lock import hidden, one_writer
from arcflow_jax.storage.paths import as_path, file_test, in_bucket, local_copy, remove_tree, sizes_below
from arcflow_jax.storage.safetensors import read_header, read_metadata, write_tensors
from tests.helpers.buckets import bucket
from tests.helpers.processes import child

HOLD = """
import sys, time
from arcflow_jax.storage.lock import one_writer
from arcflow_jax.storage.paths import as_path
with one_writer(as_path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module", params=["gs", "s3"])
def root(request):
    pytest.importorskip({"gs": "gcp_storage_emulator", "s3": "moto"}[request.param])
    with bucket(request.param) as url:
        yield url


@pytest.fixture
def folder(root, request):
    path = as_path(f"{root}/{request.node.name}".replace("[", "-").replace("]", ""))
    remove_tree(path)
    return path


def test_a_path_has_what_pathlib_has(folder):
    file = folder / "deep" / "a.json"
    assert in_bucket(file)
    assert str(file.parent) == f"{folder}/deep"
    assert not file.exists()
    assert not folder.is_dir()
    file.write_bytes(b"0123456789")
    assert file.is_file()
    assert not file.is_dir()
    assert folder.is_dir()
    assert (folder / "deep").is_dir()
    assert file.stat().st_size == 10
    assert abs(file.stat().st_mtime - time.time()) < 60
    assert file.read_bytes(2, 5) == b"234"
    assert list(folder.iterdir()) == [folder / "deep"]
    assert list((folder / "deep").glob("*.json")) == [file]
    assert not list((folder / "deep").glob("*.txt"))
    assert list(folder.rglob("*")) == [file]
    assert sizes_below(folder) == {"deep/a.json": 10}
    is_file = file_test(folder)
    assert is_file(file)
    assert not is_file(folder / "b")
    with local_copy(folder / "deep") as local:
        assert (local / "a.json").read_bytes() == b"0123456789"
    with pytest.raises(FileExistsError):
        file.write_bytes(b"", new=True)
    (folder / "b").write_bytes(b"", new=True)
    remove_tree(folder)
    assert not folder.exists()
    file.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        file.read_bytes()


def test_what_another_process_writes_is_seen(folder):
    assert not (folder / "new").exists()
    assert not folder.exists()
    script = "import sys; from arcflow_jax.storage.paths import as_path; as_path(sys.argv[1]).write_bytes(b'1')"
    assert child(script, folder / "new").wait() == 0
    assert (folder / "new").exists()
    assert list(folder.iterdir()) == [folder / "new"]


def test_files(folder):
    write_json(folder / "a.json", {"a": 1})
    assert read_json(folder / "a.json") == {"a": 1}
    write_file(folder / "lines", b"one\ntwo\n")
    assert [line for _, line in read_lines(folder / "lines")] == [b"one\n", b"two\n"]
    with pytest.raises(UserError, match=r"b\.json is missing"):
        read_json(folder / "b.json")


def test_a_file_that_grows(folder, monkeypatch):
    path = folder / "log"
    with append(path) as log:
        log.write("one\n")
        log.flush()
        assert path.read_text() == "one\n"
        log.write("two\n")
        log.flush()
        assert path.read_text() == "one\n"  # not so soon again
        later = time.monotonic() + 31
        monkeypatch.setattr(bucket_module.time, "monotonic", lambda: later)
        log.flush()
        assert path.read_text() == "one\ntwo\n"
        log.write("three\n")
    assert path.read_text() == "one\ntwo\nthree\n"
    with append(path) as log:
        log.write("four\n")
    assert path.read_text() == "one\ntwo\nthree\nfour\n"


def test_a_file_whose_upload_takes_long_is_uploaded_less_often(monkeypatch):
    """A run waits for it: previews of large images make TensorBoard's file of hundreds of megabytes."""
    now, ends = [0.0], []
    monkeypatch.setattr(bucket_module.time, "monotonic", lambda: now[0])

    class Slow:
        def exists(self) -> bool:
            return False

        def write_bytes(self, data: bytes) -> None:
            now[0] += 10
            ends.append(now[0])

    file = bucket_module.Growing(Slow())
    for _ in range(100):
        now[0] += 10
        file.write(b"line\n")
        file.flush()
    assert len(ends) > 3
    assert min(np.diff(ends)) >= 10 / 0.05  # a twentieth of the time


def test_a_directory_is_whole_or_not_there(folder):
    out = folder / "out"

    def fail() -> None:
        with new_output(out, "done.json"), whole_directory(out, 10) as aside:
            (aside / "part").write_bytes(b"1")
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fail()
    assert not folder.exists()
    (out / ".incomplete").write_bytes(b"")  # a writer was killed here
    (out / "part of a killed writer").write_bytes(b"1")
    with new_output(out, "done.json"), whole_directory(out, 10) as aside:
        write_file(aside / "done.json", b"{}")
    assert [path.name for path in folder.rglob("*")] == ["done.json"]
    with pytest.raises(UserError, match="out exists already"), new_output(out, "done.json"):
        pass
    (out / ".incomplete").write_bytes(b"")  # killed when all was done
    with pytest.raises(UserError, match="out exists already"), new_output(out, "done.json"):
        pass
    (folder / "other" / "notes").write_bytes(b"not ours")
    with pytest.raises(UserError, match="other exists already"), new_output(folder / "other", "done.json"):
        pass
    assert (folder / "other" / "notes").exists()


@pytest.mark.parametrize("end", [b"", b"\r", b"\n", b"\r\n", b"\n\r", b"\r\r"])
def test_every_last_byte_is_written(folder, tmp_path, end):
    (tmp_path / "local").write_bytes(b"0123" + end)
    (folder / "uploaded").upload(tmp_path / "local")
    (folder / "new").write_bytes(b"0123" + end, new=True)
    (folder / "again").write_bytes(b"before")
    (folder / "again").write_bytes(b"0123" + end)
    for name in ("uploaded", "new", "again"):
        assert (folder / name).read_bytes() == b"0123" + end
        assert (folder / name).stat().st_size == 4 + len(end)
    with pytest.raises(FileExistsError):
        (folder / "new").write_bytes(end or b"other", new=True)


def test_a_second_writer_is_refused(folder):
    process = child(HOLD, folder / "out")
    assert process.stdout.readline() == "held\n"
    who = rf"process {process.pid} on {socket.gethostname()} since .*: wait for it, or name another"
    with pytest.raises(UserError, match=f"out is being written by {who}"), one_writer(folder / "out"):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with one_writer(folder / "out"), one_writer(folder / "out"):  # taken over, and nested
        assert [path.name for path in folder.iterdir()] == [".out.lock"]
    assert not folder.exists()


def test_a_lease_of_another_host(folder, monkeypatch):
    place = hidden(folder / "out", "lock")
    now = time.time()
    place.write_bytes(msgspec.json.encode(lease.Holder(12, "faraway", now - 500, now - lease.EXPIRES + 20)))
    with pytest.raises(UserError, match="by process 12 on faraway since"), one_writer(folder / "out"):
        pass
    place.write_bytes(msgspec.json.encode(lease.Holder(12, "faraway", now - 500, now - lease.EXPIRES - 1)))
    monkeypatch.setattr(lease, "RENEWED", 0.05)
    with one_writer(folder / "out"):
        first = lease.read(place)
        assert (first.process, first.host) == (os.getpid(), socket.gethostname())
        deadline = time.monotonic() + 20
        while lease.read(place).renewed == first.renewed and time.monotonic() < deadline:
            time.sleep(0.05)
        assert lease.read(place).renewed > first.renewed
    assert not place.exists()


def test_a_lease_that_was_taken_over_is_left_to_the_other(folder, monkeypatch):
    """As after a suspension that was longer than the lease."""
    place, now = hidden(folder / "out", "lock"), time.time()
    other = lease.Holder(12, "faraway", now, now)
    held = lease.Lease(place)
    held.acquire()
    place.write_bytes(msgspec.json.encode(other))
    monkeypatch.setattr(lease, "RENEWED", 0.0)
    renewal = threading.Thread(target=held.renew, daemon=True)
    renewal.start()
    renewal.join(20)
    assert not renewal.is_alive()
    assert lease.read(place) == other
    held.release()
    assert lease.read(place) == other


@pytest.mark.parametrize("runs", [False, True])
def test_a_lease_of_the_same_process_id_from_before(folder, monkeypatch, runs):
    """Of this container before it started again; or of another one that runs, with the same host name."""
    place, now = hidden(folder / "out", "lock"), time.time()
    old = lease.Holder(os.getpid(), socket.gethostname(), lease.STARTED - 1, now)
    place.write_bytes(msgspec.json.encode(old))
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if runs:
            place.write_bytes(msgspec.json.encode(msgspec.structs.replace(old, renewed=now + lease.RENEWED)))

    monkeypatch.setattr(lease.time, "sleep", sleep)
    refused = pytest.raises(UserError, match="is being written by") if runs else contextlib.nullcontext()
    with refused, one_writer(folder / "out"):
        assert lease.read(place).since > lease.STARTED
    assert slept[0] > lease.RENEWED  # long enough to see who runs


def test_a_lease_that_expired_on_this_host(folder):
    """Its process id is that of another process meanwhile."""
    place, now = hidden(folder / "out", "lock"), time.time()
    expired = lease.Holder(os.getppid(), socket.gethostname(), now - 500, now - lease.EXPIRES - 1)
    place.write_bytes(msgspec.json.encode(expired))
    with one_writer(folder / "out"):
        assert lease.read(place).process == os.getpid()


def test_images_and_prompts(folder):
    encoded = io.BytesIO()
    Image.new("RGB", (4, 2), "red").save(encoded, "PNG")
    for name in ("a", "b"):
        (folder / "beside" / f"{name}.png").write_bytes(encoded.getvalue())
        (folder / "beside" / f"{name}.txt").write_text(f"image {name}")
    assert [image.caption for image in read_images(str(folder / "beside"))] == ["image a", "image b"]
    (folder / "listed" / "deep" / "c.png").write_bytes(encoded.getvalue())
    (folder / "listed" / "metadata.jsonl").write_text('{"file_name": "deep/c.png", "text": "image c"}\n')
    (image,) = read_images(str(folder / "listed"))
    assert read_image(image.files[0]).size == (4, 2)
    (folder / "listed" / "deep" / "c.png").unlink()
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 1: there is no .*/listed/deep/c\.png"):
        read_images(str(folder / "listed"))
    (folder / "prompts" / "a.txt").write_text("one\ntwo\n")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"prompt": ["three"]}), table := io.BytesIO())
    (folder / "prompts" / "b.parquet").write_bytes(table.getvalue())
    assert read_prompts(str(folder / "prompts")).texts == ["one", "two", "three"]


def test_tensors(folder):
    tensors = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "empty": np.zeros((0, 2), np.int8)}
    write_tensors(folder / "x.safetensors", tensors, {"key": "value"})
    read = read_header(folder / "x.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(np.asarray(read[name]), tensor)
    np.testing.assert_array_equal(np.asarray(read["a"][1:2]), tensors["a"][1:2])
    assert read_metadata(folder / "x.safetensors") == {"key": "value"}
    cut = (folder / "x.safetensors").read_bytes()[:-4]
    (folder / "cut.safetensors").write_bytes(cut)
    with pytest.raises(UserError, match="is truncated or corrupt: it ends before 2 of its tensors"):
        read_header(folder / "cut.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gs://", "gs:// names no bucket: gs://BUCKET/PATH would"),
        ("s3:///x", None),
        ("http://host/x", "paths are local, gs://BUCKET/PATH or s3://BUCKET/PATH, not http://"),
        ("hdfs://host/x", "not hdfs://"),
    ],
)
def test_places_that_are_no_path(text, message):
    if message is None:
        assert as_path(text).bucket == "x"
        return
    with pytest.raises(UserError, match=message):
        as_path(text)


def test_a_bucket_itself_is_no_output():
    with pytest.raises(UserError, match="name a path in the bucket, gs://b/NAME"), one_writer(as_path("gs://b")):
        pass


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_busy_store_is_asked_again(scheme):
    pytest.importorskip({"gs": "gcp_storage_emulator", "s3": "moto"}[scheme])
    with bucket(scheme, "busy") as url:
        for i in range(2):
            write_file(as_path(f"{url}/f{i}"), b"%d" % i)
        assert [as_path(f"{url}/f{i}").read_bytes() for i in range(2)] == [b"0", b"1"]


@pytest.mark.parametrize(
    ("scheme", "reads", "writes"),
    [
        ("gs", "storage.objects.get and storage.objects.list", "storage.objects.create and storage.objects.delete"),
        ("s3", "s3:GetObject and s3:ListBucket", "s3:PutObject and s3:DeleteObject"),
    ],
)
def test_a_store_that_denies_names_bucket_and_permission(scheme, reads, writes):
    pytest.importorskip({"gs": "gcp_storage_emulator", "s3": "moto"}[scheme])
    with bucket(scheme, "denied") as url:
        with pytest.raises(UserError, match=f"this account may not read bucket bucket: it needs {reads}"):
            read_json(as_path(f"{url}/model.json"))
        denied = pytest.raises(UserError, match=f"may not write to bucket bucket: it needs {writes}")
        with denied, one_writer(as_path(f"{url}/out")):
            pass


def test_without_the_client_the_error_names_the_extra():
    script = """
import sys
sys.modules["gcsfs"] = None
from arcflow_jax.errors import UserError
from arcflow_jax.storage.paths import as_path
try:
    as_path("gs://bucket/x").exists()
except UserError as error:
    print(error)
"""
    process = child(script)
    assert "pip install 'arcflow_jax[gcs]'" in process.communicate()[0]


@pytest.mark.slow
def test_a_store_that_does_not_answer(monkeypatch):
    pytest.importorskip("s3fs")
    script = """
from arcflow_jax.errors import report_errors
from arcflow_jax.storage.files import read_json
from arcflow_jax.storage.paths import as_path
with report_errors():
    read_json(as_path("s3://bucket/x"))
"""
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "k"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    process = child(script)
    said, _ = process.communicate(timeout=60)
    assert "error: cannot read s3://bucket/x: bucket bucket does not answer, try again" in said
    assert process.returncode == 1  # it is not the user who has to correct this
