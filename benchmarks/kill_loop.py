"""Kills a small run at random moments, resumes it, and compares its end bit by bit with an undisturbed run.

    python -m benchmarks.kill_loop --kills 100 --processes 1 --out runs/kills

A kill is SIGKILL, to one process, at a moment drawn uniformly from one and a half times what an undisturbed run takes.
So some kills come while the program starts, some while it trains or saves. A run that reaches its end is compared, and
the next begins. OUT may be a path in a bucket; with --emulated, in one that an emulator on this machine holds in
memory: gs://bucket/PATH or s3://bucket/PATH. The last line is the result; the exit code is 1 if an end differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time

import numpy as np

from arcflow_jax.checkpoints.training import Checkpoints
from arcflow_jax.storage.files import json_records
from arcflow_jax.storage.paths import as_path

STEPS = 40
SETTINGS = {
    **{"resolutions": "((32, 32),)", "batch": 4, "steps": STEPS, "log_every": 1, "save_every": 3, "preview_every": 0},
    **{"adapter.modes": 3, "adapter.rank": 2, "distillation.decay": 20, "distillation.states": 2},
}
COMMAND = [sys.executable, "-c", "from arcflow_jax.cli.app import main; main()", "train", "--config", "tiny"]
SPAN = 1.5  # moments of a kill, in times that an undisturbed run takes: other programs may slow the start down
DEADLINE = 1800  # seconds for a process to end, on a busy machine


def start(out: str, processes: int) -> list[subprocess.Popen]:
    """The processes of one start of a run, with one CPU device each."""
    options = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    options += [f"--config.out={out}", f"--config.mesh=({processes}, 1, 1, 1)"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = [
        ["--coordinator", address, "--processes", str(processes), "--process-id", str(i)] for i in range(processes)
    ]
    return [
        subprocess.Popen(
            [*COMMAND, *options, *(extra if processes > 1 else [])],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for extra in together
    ]


def end(running: list[subprocess.Popen]) -> tuple[list[int], str]:
    """Waits for all processes; their exit codes, and the last that they wrote to stderr, for an error."""
    try:
        said = [process.communicate(timeout=DEADLINE)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    codes = [process.returncode for process in running]
    return codes, "\n".join(f"{code}: {text[-3000:]}" for code, text in zip(codes, said, strict=True))


def kill_one(running: list[subprocess.Popen], after: float, draw: random.Random) -> bool:
    """Kills one of the processes at a moment. Returns whether it was still running."""
    chosen = draw.choice(running)
    try:
        chosen.wait(after)
        return False
    except subprocess.TimeoutExpired:
        chosen.kill()
        return True


def result(out: str) -> tuple[dict[str, np.ndarray], list[tuple[int, float]]]:
    """All arrays of a run's last checkpoint, and the loss of each training step of its log."""
    with Checkpoints(as_path(out), read_only=True) as checkpoints:
        assert checkpoints.latest == STEPS, f"{out} ends at {checkpoints.latest}"
        arrays = flat(checkpoints.everything(STEPS))
    return arrays, [(line["step"], line["loss"]) for _, line in json_records(as_path(out) / "log.jsonl")]


def flat(tree: dict) -> dict[str, np.ndarray]:
    """The arrays of a nested dict, by dotted name."""
    import jax

    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def differences(one: tuple, two: tuple) -> list[str]:
    """What differs between two results, bit by bit."""
    names = [name for name in one[0].keys() | two[0].keys() if bits(one[0], name) != bits(two[0], name)]
    return names + (["log.jsonl"] if one[1] != two[1] else [])


def bits(arrays: dict[str, np.ndarray], name: str) -> bytes | None:
    return arrays[name].tobytes() if name in arrays else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", required=True, help="a folder, or gs://BUCKET/PATH")
    parser.add_argument("--emulated", action="store_true", help="the bucket of --out is an emulator's, on this machine")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no further run begins")
    arguments = parser.parse_args()
    with emulated_bucket(arguments.out) if arguments.emulated else contextlib.nullcontext():
        different = kill_and_compare(arguments)
    sys.exit(1 if different else 0)


def emulated_bucket(out: str) -> contextlib.AbstractContextManager[str]:
    """The emulator that the tests use, which needs what the tests need."""
    from tests.helpers.buckets import bucket

    return bucket(out.partition("://")[0])


def kill_and_compare(arguments: argparse.Namespace) -> int:
    """How many of the runs that were killed differ from the undisturbed one."""
    out, draw, began = arguments.out.rstrip("/"), random.Random(arguments.seed), time.monotonic()

    for name in ("warm", "undisturbed"):  # the first compiles, and fills the cache
        then = time.monotonic()
        codes, said = end(start(f"{out}/{name}", arguments.processes))
        assert codes == [0] * arguments.processes, said
        seconds = time.monotonic() - then
    expected = result(f"{out}/undisturbed")
    assert expected[0]
    print(f"an undisturbed run takes {seconds:.1f} s; its last checkpoint has {len(expected[0])} arrays", flush=True)

    kills, runs, different, slow = 0, 0, 0, 0.0
    while kills < arguments.kills and time.monotonic() - began < 60 * arguments.minutes:
        killed = 0
        while True:
            more = kills + killed < arguments.kills
            running = start(f"{out}/killed-{runs}", arguments.processes)
            hit = more and kill_one(running, draw.uniform(0, SPAN * seconds), draw)
            then = time.monotonic()
            codes, said = end(running)
            if not hit:
                assert codes == [0] * arguments.processes, said
                break
            slow = max(slow, time.monotonic() - then)
            killed += 1
            print(f"kill {kills + killed}", flush=True)
            if 0 in codes:  # killed as it ended: what another says, that all is done, has to be true
                break
        kills, runs = kills + killed, runs + 1
        wrong = differences(result(f"{out}/killed-{runs - 1}"), expected)
        different += bool(wrong)
        print(f"run {runs}: {killed} kills, {', '.join(wrong[:3]) or 'the same'}; {kills} kills so far", flush=True)
    print(json.dumps({"processes": arguments.processes, "kills": kills, "runs": runs, "runs_that_differ": different,
                      "slowest_end_of_the_others_s": round(slow, 1),
                      "minutes": round((time.monotonic() - began) / 60, 1)}))  # fmt: skip
    return different


if __name__ == "__main__":
    main()
