"""SIGTERM to one of two processes: both stop after the same training step."""

from __future__ import annotations

import signal
import socket

from tests.helpers.processes import child

TWO_PROCESSES = """
import sys, time
import jax
from arcflow_jax.parallel.preemption import Preemption
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
with Preemption() as preemption:
    for step in range(1, 3000):
        print(step, flush=True)
        if preemption.reached(step):
            break
        time.sleep(0.02 if sys.argv[2] == "0" else 0.03)
"""


def test_two_processes_stop_after_the_same_step():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [child(TWO_PROCESSES, address, index) for index in range(2)]
    assert both[1].stdout.readline() == "1\n"
    both[1].send_signal(signal.SIGTERM)  # only one of them gets it
    ends = [process.communicate(timeout=300)[0].split()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert ends[0] == ends[1]
    assert int(ends[0]) < 2999
