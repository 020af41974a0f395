"""The same training on one device, on eight devices in several meshes, and in two processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcflow_jax.errors import UserError
from arcflow_jax.parallel import processes as distributed
from arcflow_jax.training.embeddings import embed_prompts
from arcflow_jax.training.loop import train
from arcflow_jax.training.recipe import Recipe
from tests.helpers import few_steps
from tests.helpers.processes import finish, free_address, start
from tests.helpers.tiny_run import PROMPTS, losses, recipe


@pytest.fixture(scope="module")
def one_device() -> list[float]:
    logs, *_ = few_steps.few_steps((1, 1, 1, 1))
    found = few_steps.losses(logs)
    assert np.isfinite(found).all()
    assert len(set(found)) == few_steps.STEPS
    return found


MESHES = [(1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)]


@pytest.mark.slow
def test_eight_devices_train_as_one(one_device):
    found = json.loads(finish(start(8, few_steps.__file__, json.dumps(MESHES))).splitlines()[-1])
    for mesh, of_mesh in zip(MESHES, found, strict=True):
        np.testing.assert_allclose(of_mesh, one_device, rtol=1e-4, err_msg=str(mesh))


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
    settings |= {"preview_every": 2, "preview_prompts": ("a red circle", "a ring"), "save_every": 2}
    return recipe(model, out, **settings | changes, distillation=guided)


def steps_of(run: Path) -> dict[int, float]:
    """The loss of each training step in a run's log, which has each once."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))  # only one process writes it
    return {line["step"]: line["loss"] for line in lines}


@contextlib.contextmanager
def two_processes(model: Path, run: Path) -> Iterator[list[subprocess.Popen]]:
    """Two processes with two devices each, which train without end, and are killed when the `with` block ends."""
    address = free_address()
    processes = [start(2, "-c", textwrap.dedent(EVERYTHING), model, run, address, i) for i in (0, 1)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(processes: list[subprocess.Popen], reached: Callable[[], bool]) -> None:
    while not reached():
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.1)


@pytest.mark.slow
def test_everything_at_once_on_two_processes_that_are_killed_and_preempted(tiny_flux, tmp_path):
    """Images, CFG, embedding cache and previews are those of one process, which also resumes the run on its own mesh.

    SIGTERM at one of the two ends both at the same step.
    """
    (tmp_path / "images").mkdir()
    for i, prompt in enumerate(PROMPTS):
        noise = np.random.default_rng(i).integers(0, 255, (40, 50, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(prompt)
    run = tmp_path / "two"
    embed_prompts(dataclasses.replace(everything(tiny_flux, run), embeddings=""), tmp_path / "embeddings")

    with two_processes(tiny_flux, run) as processes:
        wait_for(processes, lambda: (run / "checkpoints" / "2").is_dir() and len(losses(run)) >= 3)
    killed = steps_of(run)
    last = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    with two_processes(tiny_flux, run) as processes:
        wait_for(processes, lambda: len(losses(run)) > max(len(killed), last))
        processes[1].send_signal(signal.SIGTERM)
        told = [finish(process, 143).splitlines()[-1] for process in processes]
    preempted = steps_of(run)
    done = len(preempted)
    assert (
        told == [f"preempted: checkpoint at step {done} of 10000 written to {run}; run the same command to resume"] * 2
    )
    train(everything(tiny_flux, run, mesh="auto", steps=done + 1))

    alone = train(everything(tiny_flux, tmp_path / "one", steps=done + 1))
    for found in (killed, preempted, steps_of(run)):
        np.testing.assert_allclose(list(found.values()), losses(alone)[: len(found)], rtol=1e-4)
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
