"""The same training on one device, on eight devices in several meshes, and in two processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcflow_jax.errors import UserError
from arcflow_jax.parallel import processes as distributed
from arcflow_jax.training.embeddings import embed_prompts
from arcflow_jax.training.recipe import Recipe
from tests.helpers import few_steps
from tests.helpers.processes import with_devices
from tests.training.test_train import CONFIGS, PROMPTS, losses, recipe, train


@pytest.fixture(scope="module")
def one_device() -> list[float]:
    logs, *_ = few_steps.few_steps((1, 1, 1, 1))
    found = few_steps.losses(logs)
    assert np.isfinite(found).all()
    assert len(set(found)) == few_steps.STEPS
    return found


def start(devices: int, *command: object) -> subprocess.Popen:
    """Python in a process with so many CPU devices."""
    env = {
        **os.environ,
        **with_devices(devices),
        "PYTHONPATH": os.pathsep.join([str(CONFIGS.parent), str(Path(__file__).parent)]),
    }
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> str:
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return stdout


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)]


@pytest.mark.slow
def test_eight_devices_train_as_one(one_device):
    found = json.loads(finish(start(8, few_steps.__file__, json.dumps(MESHES))).splitlines()[-1])
    for mesh, of_mesh in zip(MESHES, found, strict=True):
        np.testing.assert_allclose(of_mesh, one_device, rtol=1e-4, err_msg=str(mesh))


@pytest.mark.slow
def test_two_processes_train_as_one_device(one_device):
    address, meshes = free_address(), json.dumps([(2, 2, 2, 1)])
    processes = [start(4, few_steps.__file__, meshes, address, i) for i in (0, 1)]
    for process in processes:
        (found,) = json.loads(finish(process).splitlines()[-1])
        np.testing.assert_allclose(found, one_device, rtol=1e-4)


ENDLESS = """
    import sys
    from pathlib import Path
    from arcflow_jax.parallel.processes import initialize
    from tests.training.test_train import recipe, train
    model, out, address, process = sys.argv[1:]
    initialize(address, 2, int(process))
    train(recipe(Path(model), Path(out), mesh=(2, 2, 2, 1), steps=10_000))
"""


@pytest.mark.slow
def test_run_of_two_processes_is_killed_and_resumed_by_one(tiny_flux, tmp_path):
    """They save every two training steps. One process on one device resumes the run on its own mesh."""
    run, address = tmp_path / "two" / "run", free_address()
    run.parent.mkdir()
    processes = [start(4, "-c", textwrap.dedent(ENDLESS), tiny_flux, run, address, i) for i in (0, 1)]
    try:
        while not ((run / "checkpoints" / "4").is_dir() and len(losses(run)) >= 5):
            assert all(process.poll() is None for process in processes), "ended by itself"
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    two = {line["step"]: line["loss"] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines())}
    assert list(two) == list(range(1, len(two) + 1))  # only one of them writes it

    last = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    train(recipe(tiny_flux, run, steps=last + 2))
    after = {line["step"]: line["loss"] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines())}
    straight = losses(train(recipe(tiny_flux, tmp_path / "straight", steps=last + 2)))
    np.testing.assert_allclose([two[i] for i in range(1, last + 1)], straight[:last], rtol=1e-4)
    np.testing.assert_allclose([after[last + 1], after[last + 2]], straight[last:], rtol=1e-4)


EVERYTHING = """
    import sys
    from pathlib import Path
    from arcflow_jax.errors import report_errors
    from arcflow_jax.parallel.processes import initialize
    from tests.parallel.test_processes import everything, train
    model, out, address, process = sys.argv[1:]
    initialize(address, 2, int(process))
    with report_errors():
        train(everything(Path(model), Path(out), mesh=(2, 2, 1, 1), steps=10_000))
"""


def everything(model: Path, out: Path, **changes: object) -> Recipe:
    """A run that starts from images with cached embeddings, and has CFG and previews."""
    guided = {"teacher_guidance": "cfg", "negative_prompt": "a blue square", "data_weight": 0.5, "decay": 10_000}
    folder = out.parent
    settings = {"images": str(folder / "images"), "embeddings": str(folder / "embeddings"), "guidance": 3.0, "batch": 4}
    settings |= {"preview_every": 2, "preview_prompts": ("a red circle", "a ring"), "save_every": 10_000}
    return recipe(model, out, **settings | changes, distillation=guided)


@pytest.mark.slow
def test_everything_at_once_on_two_processes_until_one_is_preempted(tiny_flux, tmp_path):
    """Images, CFG, embedding cache and previews are those of one process; SIGTERM at one ends both at the same step."""
    (tmp_path / "images").mkdir()
    for i, prompt in enumerate(PROMPTS):
        noise = np.random.default_rng(i).integers(0, 255, (40, 50, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(prompt)
    run, address = tmp_path / "two", free_address()
    embed_prompts(dataclasses.replace(everything(tiny_flux, run), embeddings=""), tmp_path / "embeddings")
    processes = [start(2, "-c", textwrap.dedent(EVERYTHING), tiny_flux, run, address, i) for i in (0, 1)]
    try:
        while not ((run / "log.jsonl").exists() and len(losses(run)) >= 3):
            assert all(process.poll() is None for process in processes), processes[0].communicate()
            time.sleep(0.2)
        processes[1].send_signal(signal.SIGTERM)
        told = [finish(process).splitlines()[-1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    steps = len(losses(run))
    assert (
        told == [f"preempted: checkpoint at step {steps} of 10000 written to {run}; run the same command to resume"] * 2
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(steps)]

    alone = train(everything(tiny_flux, tmp_path / "one", steps=2))
    np.testing.assert_allclose(losses(run)[:2], losses(alone), rtol=1e-4)
    sheets = [np.asarray(Image.open(each / "previews" / "000002.png"), np.int32) for each in (run, alone)]
    np.testing.assert_allclose(*sheets, atol=2)


PARTS = """
    import sys
    import jax, numpy as np
    from jax.sharding import Mesh
    from arcflow_jax.parallel.processes import from_part, initialize, is_main, local_part
    from arcflow_jax.parallel.mesh import MESH_AXES
    initialize(sys.argv[1], 2, int(sys.argv[2]))
    assert is_main() == (sys.argv[2] == "0")
    whole = np.arange(16.0).reshape(8, 2)
    shuffled = [jax.devices()[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    found = []
    for devices, mesh in [
        (jax.devices(), (8, 1, 1, 1)),
        (jax.devices(), (2, 2, 2, 1)),
        (jax.devices(), (1, 4, 1, 2)),
        (jax.devices(), (1, 1, 8, 1)),
        (shuffled, (8, 1, 1, 1)),
    ]:
        mesh = Mesh(np.array(devices).reshape(mesh), MESH_AXES)
        index, count = local_part(mesh)
        batch = from_part(whole[index * 8 // count:(index + 1) * 8 // count], mesh)
        assert batch.shape == whole.shape
        for shard in batch.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
        found.append((index, count))
    print(found)
"""


def test_each_process_loads_its_slice_of_a_batch():
    address = free_address()
    processes = [start(4, "-c", textwrap.dedent(PARTS), address, i) for i in (0, 1)]
    first, second = (finish(process).strip() for process in processes)
    assert first == "[(0, 2), (0, 2), (0, 2), (0, 1), (0, 1)]"
    assert second == "[(1, 2), (1, 2), (1, 2), (0, 1), (0, 1)]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, None), "belong together: give all three"),
        (("host", 2, 0), "--coordinator is 'host', but has to be HOST:PORT"),
        (("host:1", 2, 2), "--process-id is 2, but of 2 processes it has to be 0 to 1"),
    ],
)
def test_invalid_processes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(*arguments)
