"""The SLURM template on a SLURM of one node: two tasks find each other, and a preempted job starts again and ends.

Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

NODE = ROOT / "tests" / "launch" / "slurm_node.sh"
STEPS = 12


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Iterator[None]:
    started = subprocess.run([NODE, "start", tmp_path / "slurm"], stdout=subprocess.PIPE, text=True)
    try:
        assert started.returncode == 0
        monkeypatch.setenv("SLURM_CONF", started.stdout.partition("=")[2].strip())
        yield
    finally:
        subprocess.run([NODE, "stop", tmp_path / "slurm"])


def output(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout


def wait_for(reached: Callable[[], bool], log: Path, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, log.read_text() if log.exists() else "the job has not begun"
        time.sleep(0.2)


@pytest.mark.long
@pytest.mark.skipif(not (shutil.which("slurmctld") and os.geteuid() == 0), reason="needs root, and SLURM's daemons")
def test_a_preempted_job_starts_again_and_ends(slurm, tiny_flux, tmp_path, monkeypatch):
    run, log = tmp_path / "run", tmp_path / "job.log"
    arcflow = tmp_path / "arcflow"
    arcflow.write_text(f"#!{sys.executable}\nfrom arcflow_jax.cli.app import main\nmain()\n")
    arcflow.chmod(0o755)
    monkeypatch.setenv("ARCFLOW", str(arcflow))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    node = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--time=20")
    settings = {"model": tiny_flux, "out": run, "resolutions": "((32, 32),)", "batch": 8, "steps": STEPS}
    settings |= {"log_every": 1, "save_every": 1000, "preview_every": 0}
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    sbatch = ("sbatch", "--parsable", *node, f"--output={log}", f"--chdir={ROOT}", ROOT / "tools/launch/slurm.sh")
    job = output(*sbatch, "--config", "tiny", *overrides).strip()

    def steps() -> list[int]:
        lines = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
        return [json.loads(line)["step"] for line in lines]

    def show() -> dict[str, str]:
        return dict(re.findall(r"(\S+?)=(\S+)", output("scontrol", "show", "job", job)))

    wait_for(lambda: len(steps()) >= 3, log)
    output("scancel", "--signal=TERM", job)
    wait_for(lambda: "goes into the queue again" in log.read_text(), log)
    done = len(steps())
    assert 3 <= done < STEPS
    assert f"preempted: checkpoint at step {done} of {STEPS} written to {run}" in log.read_text()
    wait_for(lambda: show()["JobState"] in ("COMPLETED", "FAILED"), log)
    assert (show()["JobState"], show()["Restarts"], show()["ExitCode"]) == ("COMPLETED", "1", "0:0"), log.read_text()
    assert steps() == list(range(1, STEPS + 1))
    assert f"resumes after training step {done}" in log.read_text()
    assert log.read_text().count("2 × cpu: data 1, fsdp 2") == 2  # mesh "auto" of two processes
