"""`arcflow warm`, in processes of their own, as users run it: what it leaves is what sampling needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.command_line import assert_refused
from tests.helpers.random_student import write_adapter

SAMPLE = """
import jax, sys
compiled = []
jax.monitoring.register_event_listener(lambda event, **_: compiled.append(event) if "cache_misses" in event else None)
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if event.endswith("cache_retrieval_time_sec") else None
)
from arcflow_jax.cli.app import main
try:
    main(sys.argv[1:])
finally:
    print(*(event.split("/")[-1] for event in compiled))
"""


@pytest.mark.slow
def test_sampling_finds_every_program(tiny_flux, tmp_path):
    student = write_adapter(tiny_flux, tmp_path / "student", seed=0)
    model = ["--model", str(tiny_flux), "--adapter", str(student), "--batch-size", "2"]
    keep_all = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")} | keep_all

    def output(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    before = sorted(tmp_path.iterdir())
    printed = output("-c", SAMPLE, "warm", *model, "--sizes", "64x32")
    each = r"64x32, 2 a batch, 2 steps: [0-9.]+ s\n64x32, 1 a batch, 2 steps: [0-9.]+ s\n"
    assert re.search(rf"{each}[1-9][0-9]* programs compiled, [0-9]+ found", printed), printed
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / "xla"]

    size = ["--height", "32", "--width", "64"]
    printed = output("-c", SAMPLE, "sample", *model, *size, "--prompt", "a red circle", "--seed", "7", "--out", "made")
    assert len(list((tmp_path / "made").iterdir())) == 1
    events = printed.splitlines()[-1].split()
    assert events.count("cache_retrieval_time_sec") > 3
    assert "cache_misses" not in events


def test_sizes_are_checked_first(capfd, tiny_flux, tmp_path):
    model = ("warm", "--model", tiny_flux, "--teacher")
    assert_refused(
        capfd, tmp_path, *model, "--sizes", "64", message="size is '64', but has to be WIDTHxHEIGHT, such as 1024x1024"
    )
    assert_refused(capfd, tmp_path, *model, "--sizes", "64x64,40x64", message="image size 64x40: height and")
    assert_refused(capfd, tmp_path, *model, "--sizes", "64x64", "--width", "64", message="leave one or the other out")
