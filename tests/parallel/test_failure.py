"""One of two processes fails or is killed: the other ends, says why, and both have an exit code that fits."""

from __future__ import annotations

import re
import signal
import subprocess
import textwrap
import time

import pytest

from arcflow_jax.errors import NetworkError, UserError
from arcflow_jax.parallel import failure
from tests.helpers.processes import free_address, start
from tests.helpers.tiny_run import losses

WAITING = """
    import os, sys, time
    import numpy as np
    from jax.experimental import multihost_utils
    from arcflow_jax.errors import UserError, report_errors
    from arcflow_jax.parallel import failure, processes
    from arcflow_jax.parallel.failure import ends_together
    processes.HEARTBEAT = 5
    address, process, how = sys.argv[1:]
    if how.endswith("both"):
        failure.Failure.look = lambda self: None  # both fail before they hear of each other
        failure.GRACE = processes.HEARTBEAT = 1000  # and the first does not wait for the other
    with report_errors():
        processes.initialize(address, 2, int(process))
        with ends_together():
            for i in range(10_000):
                if i == 3 and how.endswith((process, "both")):
                    if how.startswith("kill"):
                        os.kill(os.getpid(), 9)
                    raise {"error": RuntimeError, "user error": UserError}[how.rpartition(" ")[0]]("no more")
                multihost_utils.process_allgather(np.ones(3))
"""


def wait_for_one(processes: list[subprocess.Popen]) -> float:
    """The time at which the first of the processes has ended."""
    end = time.monotonic() + 300  # compiling takes long on a busy machine
    while all(process.poll() is None for process in processes):
        assert time.monotonic() < end
        time.sleep(0.1)
    return time.monotonic()


def both_end(script: str, *arguments: object) -> list[tuple[int, str]]:
    """Exit code and stderr of two processes, of which one ends at most 60 s after the other."""
    address = free_address()
    processes = [start(1, "-c", textwrap.dedent(script), address, i, *arguments) for i in (0, 1)]
    try:
        first = wait_for_one(processes)
        stderr = [process.communicate(timeout=max(1, first + 60 - time.monotonic()))[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, stderr, strict=True)]


@pytest.mark.parametrize(("how", "who", "code"), [("error", 0, 1), ("user error", 1, 2)])
def test_an_exception_in_one_process_ends_both(how, who, code):
    ends = both_end(WAITING, f"{how} {who}")
    assert [each for each, _ in ends] == [code, code]
    assert "no more" in ends[who][1]
    told = [line for line in ends[1 - who][1].splitlines() if line.startswith(f"error: process {who} on ")]
    assert told, ends[1 - who][1]
    assert "failed: " in told[0]
    assert "Error: no more" in told[0]


def test_an_exception_in_both_ends_both_at_once():
    for code, stderr in both_end(WAITING, "user error both"):
        assert code == 2
        assert "error: no more" in stderr


@pytest.mark.parametrize("who", [0, 1])
def test_the_death_of_one_process_ends_the_other(who):
    ends = both_end(WAITING, f"kill {who}")
    assert ends[who][0] == -signal.SIGKILL
    assert ends[1 - who][0] == 1
    assert "error: another process of this run was killed or cannot be reached" in ends[1 - who][1]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (NetworkError("checkpoint 3 in gs://b/run cannot be reached, try again: UNAVAILABLE: CURL error"), False),
        (UserError("cannot write a checkpoint to /run: Barrier timed out"), True),
        (RuntimeError("UNAVAILABLE: Connection reset by peer"), True),
    ],
)
def test_a_bucket_that_does_not_answer_is_no_lost_process(monkeypatch, capfd, error, lost):
    monkeypatch.setattr(failure.atexit, "register", lambda function: None)
    failure.Failure().tell(error)
    assert (failure.LOST in capfd.readouterr().err) == lost


TRAINING = """
    import os, sys
    from pathlib import Path
    from arcflow_jax.errors import report_errors
    from arcflow_jax.parallel import processes
    from arcflow_jax.training.report.log import RunLog
    from arcflow_jax.training.loop import train
    from tests.helpers.tiny_run import recipe
    address, process, how, model, out = sys.argv[1:]
    log_step = RunLog.step
    def step(log, number, values):
        if number == 3 and process == "1" and how == "kill":
            os.kill(os.getpid(), 9)
        if number == 3 and process == "1" and how == "error":
            raise RuntimeError("no more")
        return log_step(log, number, values)
    RunLog.step = step
    processes.HEARTBEAT = 5
    with report_errors():
        processes.initialize(address, 2, int(process))
        one_phase = {"decay": 0}  # one program to compile
        train(recipe(Path(model), Path(out), mesh=(2, 1, 1, 1), batch=2, steps=1000, distillation=one_phase))
"""


@pytest.mark.slow
def test_training_on_two_processes_ends_when_one_does(tiny_flux, tmp_path):
    """And a run of which one process was killed resumes."""
    run = tmp_path / "run"
    (killed_main, stderr), killed = both_end(TRAINING, "kill", tiny_flux, run)
    assert killed[0] == -signal.SIGKILL
    assert killed_main == 1
    assert "error: another process of this run was killed or cannot be reached" in stderr, stderr
    assert len(losses(run)) >= 2
    # The next run has checkpoint 2, unless the kill came before it was complete
    for entry in (run / "checkpoints").iterdir():
        assert entry.name == "2" or entry.name.endswith("tmp")

    (code, stderr), (failed, own) = both_end(TRAINING, "error", tiny_flux, run)
    assert (code, failed) == (1, 1)
    assert re.search(r"^error: process 1 on .* failed: RuntimeError: no more", stderr, re.MULTILINE), stderr
    assert "RuntimeError: no more" in own
    assert "RuntimeError: no more" in (run / "error-1.log").read_text()
