"""Other processes that tests start, to kill them or to have several."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def with_devices(count: int) -> dict[str, str]:
    """The environment variables of a process that has so many CPU devices."""
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count} {os.environ['XLA_FLAGS']}"}


def child(script: str, *arguments: object) -> subprocess.Popen:
    """A Python process that runs a script, and can import what lies in tests/."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start(devices: int, *command: object) -> subprocess.Popen:
    """Python in a process with so many CPU devices, which can import what lies in tests/."""
    env = {**os.environ, **with_devices(devices), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What a process that `start` has made prints until it ends with this exit code."""
    stdout, stderr = process.communicate()
    assert process.returncode == code, stderr
    return stdout


def free_address() -> str:
    """An address for `jax.distributed`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
