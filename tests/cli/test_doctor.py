"""`arcflow doctor`, through the command line."""

from __future__ import annotations

import errno
import importlib.metadata
import types
from pathlib import Path

import jax
import pytest

from arcflow_jax.parallel.chips import GIB
from arcflow_jax.storage.paths import as_path
from tests.helpers.buckets import bucket
from tests.helpers.command_line import assert_refused, run


def test_this_machine(capfd, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "weights").write_bytes(bytes(2**24))
    monkeypatch.setenv("ARCFLOW_CACHE", str(tmp_path))
    code, out, _ = run(capfd, "doctor")
    assert code == 0
    for package in ("jax", "jaxlib", "flax", "orbax-checkpoint"):
        assert f"  {package} {importlib.metadata.version(package)}\n" in out
    assert "0: cpu, cpu, memory of the machine" in out
    assert "precision float32, attention kernel chunked" in out
    assert f"converted models: {tmp_path}/models, 0.02 GiB" in out


@pytest.mark.parametrize(
    ("kind", "capability", "gib", "expected"),
    [
        (
            "NVIDIA GeForce RTX 4090",
            "8.9",
            18,
            [
                "compute capability 8.9, 18.0 GiB of 24.0, as XLA_PYTHON_CLIENT_MEM_FRACTION=0.75 says",
                "precision bfloat16, attention kernel cudnn",
                "bf16   22.5 GiB  no",
                "int8   11.9 GiB  yes",
                "int8   19.7 GiB  with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9",
            ],
        ),
        ("Tesla T4", "7.5", 11, ["precision float16, attention kernel chunked", "int8   11.9 GiB  with XLA"]),
        ("AMD Instinct MI300X", "gfx942", 144, ["precision bfloat16, attention kernel chunked", "70.3 GiB  yes"]),
    ],
)
def test_other_devices(capfd, monkeypatch, kind, capability, gib, expected):
    gpu = types.SimpleNamespace(id=0, platform="gpu", device_kind=kind, compute_capability=capability)
    gpu.memory_stats = lambda: {"bytes_limit": gib * GIB}
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda: [gpu])
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    code, out, _ = run(capfd, "doctor")
    assert code == 0
    for text in expected:
        assert text in out


def test_a_bucket(capfd, monkeypatch):
    with bucket("gs") as place:
        code, out, _ = run(capfd, "doctor", "--bucket", place)
        assert code == 0
        assert f"{place}: listed (0 entries), written, read and removed" in out
        code, out, _ = run(capfd, "doctor", "--bucket", f"{place}/a-new-folder")
        assert "listed (0 entries), written, read and removed" in out
        assert not list(as_path(place).iterdir())


def test_a_folder_that_cannot_be_written(capfd, tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file"
    assert_refused(capfd, tmp_path, "doctor", "--bucket", place, message="/file cannot be listed: Not a directory$")


def test_a_folder_that_cannot_be_read_keeps_nothing(capfd, tmp_path, monkeypatch):
    def no_answer(path: Path) -> bytes:
        raise OSError(errno.EIO, "no answer")

    monkeypatch.setattr(Path, "read_bytes", no_answer)
    assert_refused(capfd, tmp_path, "doctor", "--bucket", tmp_path, message="cannot be read: no answer$")
    assert not list(tmp_path.iterdir())
