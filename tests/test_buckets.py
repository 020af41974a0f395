"""The whole way in a bucket: convert, train, kill, resume, sample and export, with nothing on the local disk."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from arcflow_jax.checkpoints.training import Checkpoints
from arcflow_jax.storage.paths import as_path
from arcflow_jax.training.report.trace import Trace
from tests.helpers.buckets import bucket
from tests.helpers.processes import child
from tests.helpers.tiny_run import PROMPTS

# Everything in one process, as it starts slowly; a file `killed` in the work folder says that it was killed before
WAY = """
import os, signal, sys
from pathlib import Path
from arcflow_jax.cli.app import app
from arcflow_jax.training.report.log import RunLog
from tests.helpers.tiny_run import SETTINGS

place, source, first = sys.argv[1], sys.argv[2], sys.argv[3] == "first"
MODEL, RUN, PROMPTS = f"{place}/model", f"{place}/run", f"{place}/prompts.txt"
values = SETTINGS | {"model": MODEL, "prompts": PROMPTS, "out": RUN, "preview_every": 4}
train = ["train", "--config", "tiny", *(f"--config.{name}={value}" for name, value in values.items())]

def command(*arguments):
    app(list(arguments), standalone_mode=False)

if first:
    step = RunLog.step
    def killed(self, number, values):
        if number == 3:
            from arcflow_jax.training import loop
            sys.modules["__main__"].checkpoints.manager.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number, values)
    RunLog.step = killed
    from arcflow_jax.checkpoints.training import Checkpoints
    enter = Checkpoints.__enter__
    def entered(self):
        global checkpoints
        checkpoints = self
        return enter(self)
    Checkpoints.__enter__ = entered
    command("convert", "--source", source, "--out", MODEL)
command(*train)
command("sample", "--model", MODEL, "--adapter", RUN, "--prompt", "a red circle", "--out", f"{place}/images")
command("export", "--adapter", RUN, "--out", f"{place}/export")
command("verify", MODEL)
command("verify", RUN)
"""


def weights(run: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint."""
    with Checkpoints(run, read_only=True) as checkpoints:
        tree = checkpoints.everything(step)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def run(place: object, which: str, script: str = WAY, timeout: float = 240) -> tuple[int, str]:
    """Exit code and output of a process that goes the way."""
    source = Path(__file__).parents[1] / "arcflow_jax" / "assets" / "tiny-flux"
    as_path(f"{place}/prompts.txt").parent.mkdir(parents=True, exist_ok=True)
    as_path(f"{place}/prompts.txt").write_text("\n".join(PROMPTS))
    process = child(script, place, source, which)
    said, _ = process.communicate(timeout=timeout)
    return process.returncode, said


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same on the local disk, in one go."""
    place = tmp_path_factory.mktemp("way")
    code, said = run(place, "first", WAY.replace("if number == 3:", "if False:"))
    assert code == 0, said
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "faults"),
    [("gs", ""), pytest.param("s3", "", marks=pytest.mark.long), pytest.param("gs", "busy", marks=pytest.mark.long)],
)
def test_the_whole_way(scheme, faults, undisturbed, tmp_path, monkeypatch):
    """Also in a bucket that answers every third request with 503, where clients wait before they ask again."""
    timeout = 5400 if faults else 240  # verifying reads a model array by array, each of which waits
    pytest.importorskip({"gs": "gcp_storage_emulator", "s3": "moto"}[scheme])
    monkeypatch.chdir(tmp_path)
    with bucket(scheme, faults) as url:
        code, said = run(f"{url}/way", "first", timeout=timeout)
        assert code == -9, said
        code, said = run(f"{url}/way", "second", timeout=timeout)
        assert code == 0, said
        assert "resumes after training step 2" in said
        assert not os.listdir(tmp_path)
        way = as_path(f"{url}/way")
        names = [path.relative_to(way).as_posix() for path in way.rglob("*")]
        assert not [name for name in names if name.endswith((".lock", ".incomplete", ".tmp"))]
        for expected in ("model/model.json", "run/adapter.json", "run/previews/000004.png", "export/config.json"):
            assert expected in names
        assert [name for name in names if "tensorboard/events" in name]
        lines = (way / "run" / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
        resumed, expected = weights(way / "run", 4), weights(undisturbed / "run", 4)
        exported = (way / "export" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert resumed.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(resumed[name], expected[name], err_msg=name)
    assert exported == (undisturbed / "export" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize("faults", ["", "denied"])
def test_a_trace_is_uploaded_and_never_ends_a_run(faults, tmp_path, monkeypatch, capfd):
    pytest.importorskip("gcp_storage_emulator")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with bucket("gs", faults) as url, Trace("1:1", as_path(f"{url}/profile")) as trace:
        trace.before(1)
        trace.after(1, jax.numpy.ones(2) + 1)
        if not faults:
            assert [path for path in as_path(f"{url}/profile").rglob("*") if path.name.endswith(".xplane.pb")]
    warned = "warning: the trace was not written: PermissionError: " in capfd.readouterr().err
    assert warned == bool(faults)
    assert not os.listdir(tmp_path)
