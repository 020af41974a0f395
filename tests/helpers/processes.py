"""Other processes that tests start, to kill them or to have several."""

from __future__ import annotations

import os
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
