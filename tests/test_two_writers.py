"""Two processes write the same output at once: one completes, the other gets an error that names the first.

The quick form has a few lags between the two, the long one twenty.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from arcflow_jax.checkpoints.verify import verify
from tests.helpers.command_line import assert_refused
from tests.helpers.processes import child
from tests.helpers.source_folder import write_source

# A process that does one job for each lag, after a signal to begin
WORK = """
import sys, time
from pathlib import Path
from arcflow_jax.errors import UserError
{prepare}
folder, lags = Path(sys.argv[1]), [float(lag) for lag in sys.argv[2].split(",")]
print("ready", flush=True)
for i, lag in enumerate(lags):
    while not (folder / f"go-{{i}}").exists():
        time.sleep(0.001)
    time.sleep(lag)
    out = folder / f"out-{{i}}"
    try:
        {work}
        said = "done"
    except UserError as error:
        said = str(error)
    print("SAID", said, flush=True)
"""
CONVERT = WORK.format(
    prepare="from arcflow_jax.models.conversion import convert_model",
    work="convert_model(folder / 'source', out)",
)
TRAIN = WORK.format(
    prepare="""
from arcflow_jax.training.loop import train
from arcflow_jax.training.recipe import Recipe, read_config
from tests.helpers.tiny_run import SETTINGS
settings = SETTINGS | {"model": sys.argv[3], "prompts": sys.argv[4], "steps": 3, "save_every": 1}
arguments = [f"--config.{name}={value}" for name, value in settings.items()]
""",
    work="train(Recipe.from_config(read_config('tiny', [*arguments, f'--config.out={out}'])))",
)


def race(script: str, folder: Path, lags: list[float], *arguments: object) -> Iterator[tuple[Path, list[str]]]:
    """For each lag, the output and what the two processes say, the one that begins first at first."""
    schedules = [[0.0] * len(lags), lags]
    processes = [child(script, folder, ",".join(map(str, each)), *arguments) for each in schedules]
    try:
        for process in processes:
            said_of(process, "ready")
        for i in range(len(lags)):
            (folder / f"go-{i}").touch()
            yield folder / f"out-{i}", [said_of(process, "SAID") for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def said_of(process: subprocess.Popen, word: str) -> str:
    """The rest of the next line that begins with a word."""
    seen = []
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
        seen.append(line)
    raise AssertionError("".join(seen))


LAGS = [
    pytest.param(2, id="quick"),
    pytest.param(20, id="all", marks=[pytest.mark.slow, pytest.mark.long]),
]


@pytest.mark.slow
@pytest.mark.parametrize("count", LAGS)
def test_two_conversions(tmp_path, count):
    write_source(tmp_path / "source")
    refused = 0
    for out, said in race(CONVERT, tmp_path, np.linspace(0, 0.8, count).tolist()):
        assert "done" in said
        for other in set(said) - {"done"}:
            refused += f"{out} is being written by process " in other
            assert f"{out} is being written by process " in other or f"{out} exists already" in other
        assert sorted(path.name for path in tmp_path.iterdir() if out.name in path.name) == [out.name]
        assert (out / "model.json").is_file()
    assert refused
    assert not list(tmp_path.glob(".*"))
    for i in range(count):
        with pytest.MonkeyPatch.context() as patched:  # the made-up tokenizers have no vocabulary
            patched.setattr("arcflow_jax.checkpoints.verify.load_tokenizer", lambda folder: None)
            verify(tmp_path / f"out-{i}")


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "--source", "source"],
        ["convert", "--adapter", "student", "--base", "model"],
        ["export", "--adapter", "run"],
        ["train", "--config", "tiny"],
        ["embed-prompts", "--config", "tiny"],
        ["demo"],
    ],
    ids=" ".join,
)
def test_a_second_writer_is_refused_before_anything_is_read(capfd, tmp_path, command):
    lock = tmp_path / ".out.lock"
    lock.write_text("12\nfaraway\n")
    out = [f"--config.out={tmp_path / 'out'}"] if command[0] == "train" else ["--out", tmp_path / "out"]
    assert_refused(
        capfd, tmp_path, *command, *out, message=f"out is being written by process 12 on faraway since .* remove {lock}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("count", LAGS)
def test_two_runs(tiny_flux, tmp_path, count):
    (tmp_path / "prompts.txt").write_text("a red circle\na green square\n")
    refused = 0
    for out, said in race(
        TRAIN, tmp_path, np.linspace(0.2, 8 if count > 2 else 1, count).tolist(), tiny_flux, tmp_path / "prompts.txt"
    ):
        assert "done" in said
        for other in set(said) - {"done"}:
            refused += 1
            assert f"{out} is being written by process " in other
        steps = [json.loads(line)["step"] for line in (out / "log.jsonl").open()]
        assert steps == [1, 2, 3]  # nobody wrote between
        assert verify(out) == 3  # two checkpoints and the log
    assert refused
    assert not list(tmp_path.glob(".*"))
