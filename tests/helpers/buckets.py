"""A bucket for a test: an emulator in a process of its own, and the environment variables that lead clients there."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.helpers.bucket_server import BUCKET, HOST
from tests.helpers.processes import ROOT, free_address


@contextlib.contextmanager
def bucket(scheme: str, faults: str = "", folder: Path | None = None) -> Iterator[str]:
    """A bucket's URL, gs://bucket or s3://bucket. See `bucket_server` for the faults.

    Args:
      folder: where gs:// keeps its objects, instead of in memory.
    """
    port = free_address().rpartition(":")[2]
    command = [sys.executable, "-m", "tests.helpers.bucket_server", scheme, port, *([faults] if faults else [])]
    here = f"http://{HOST}:{port}"
    account = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    account |= {"GOOGLE_CLOUD_PROJECT": "project", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    places = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "AWS_ENDPOINT_URL")
    with pytest.MonkeyPatch.context() as patched:
        for name, value in (account | dict.fromkeys(places, here)).items():
            patched.setenv(name, value)
        server = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **({"STORAGE_BASE": str(folder)} if folder else {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert server.stdout.readline() == b'"ready"\n'
            forget_clients()
            yield f"{scheme}://{BUCKET}"
        finally:
            server.kill()
            server.communicate()
            forget_clients()


def served(below: str) -> int:
    """Bytes that the emulator for gs:// has served of the objects below a path."""
    with urllib.request.urlopen(os.environ["STORAGE_EMULATOR_HOST"] + "/served") as answer:
        found = json.load(answer)
    return sum(size for name, size in found.items() if f"gs://{BUCKET}/{name}".startswith(f"{below}/"))


def forget_clients() -> None:
    """Clients are made once in a process: the next one asks the environment variables again."""
    for scheme in ("gs", "s3"):
        fsspec.get_filesystem_class(scheme).clear_instance_cache()
