"""The same training on one device, on eight devices in several meshes, and in two processes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

from arcflow_jax.errors import UserError
from arcflow_jax.parallel import processes as distributed
from arcflow_jax.parallel.mesh import MESH_AXES
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
    # Slow to learn: Adam makes large steps of rounding errors
    settings |= {"optimizer": {"learning_rate": 4e-3, "warmup": 20}, "ema": {"start": 20, "power": 8.0}}
    return recipe(model, out, **settings | changes, distillation=guided)


def steps_of(run: Path) -> dict[int, float]:
    """The loss of each training step in a run's log, which has each once."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))  # only one process writes it
    return {line["step"]: line["loss"] for line in lines}


def cut_in(run: Path) -> list[int]:
    """How many prompts were cut until each training step in a run's log."""
    return [json.loads(line)["prompts_cut"] for line in (run / "log.jsonl").read_text().splitlines()]


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
        # The first one is longer than T5 takes
        (tmp_path / "images" / f"{i}.txt").write_text(prompt + " in the center" * (10 if i == 0 else 0))
    run = tmp_path / "two"
    embed_prompts(dataclasses.replace(everything(tiny_flux, run), embeddings=""), tmp_path / "embeddings")

    with two_processes(tiny_flux, run) as processes:
        wait_for(processes, lambda: (run / "checkpoints" / "2").is_dir() and len(losses(run)) >= 3)
    killed = steps_of(run)
    assert cut_in(run) == list(killed)  # a batch has all four, and each process loads two of them
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


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """One of many devices, of several processes."""

    id: int
    process_index: int
    client: object
    platform = device_kind = "fake"


def rows_of(owners: np.ndarray, process: int, batch: int) -> list[int]:
    """The rows that a process loads, on a mesh data × fsdp × tensor × sequence of devices of these processes."""
    # JAX takes this process for process 0
    numbers = np.where(owners == process, 0, owners + 1).ravel()
    client = jax.devices()[0].client
    devices = [FakeDevice(i, int(number), client) for i, number in enumerate(numbers)]
    return distributed.local_rows(Mesh(np.array(devices).reshape(owners.shape), MESH_AXES), batch)


def hosts(*sizes: int, of: tuple[int, ...]) -> np.ndarray:
    """The process of each device in a mesh of these sizes, where a process has blocks of size `of`."""
    blocks = [size // each for size, each in zip(sizes, of, strict=True)]
    numbers = np.arange(np.prod(blocks)).reshape(blocks)
    return np.kron(numbers, np.ones(of, int))


@pytest.mark.parametrize("owners", [hosts(16, 16, 1, 1, of=(2, 4, 1, 1)), hosts(2, 4, 2, 1, of=(1, 1, 2, 1))])
@pytest.mark.parametrize("each", [1, 4])
def test_each_row_is_loaded_by_the_one_process_that_holds_it(owners, each):
    """On a slice of 16 × 16 TPUs, a host has 2 × 4 of them."""
    count, batch = owners.max() + 1, each * owners.shape[0] * owners.shape[1]
    loaded = [rows_of(owners, process, batch) for process in range(count)]
    assert [len(rows) for rows in loaded] == [batch // count] * count
    assert sorted(itertools.chain(*loaded)) == list(range(batch))


def test_rows_that_are_not_neighbours():
    owners = hosts(2, 4, 1, 1, of=(2, 2, 1, 1))  # shard data · 4 + fsdp
    assert rows_of(owners, 0, 16) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert rows_of(owners, 1, 16) == [4, 5, 6, 7, 12, 13, 14, 15]


def test_processes_that_tensor_spans_load_the_same_rows():
    owners = hosts(2, 2, 2, 2, of=(1, 2, 1, 1))
    assert [rows_of(owners, process, 4) for process in range(8)] == [[0, 1]] * 4 + [[2, 3]] * 4


ROWS = """
    import sys
    import jax, numpy as np
    from jax.sharding import Mesh
    from arcflow_jax.parallel.processes import from_rows, initialize, is_main, local_rows
    from arcflow_jax.parallel.mesh import MESH_AXES
    from arcflow_jax.parallel.together import sum_over_rows
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
        (shuffled, (1, 4, 2, 1)),
    ]:
        mesh = Mesh(np.array(devices).reshape(mesh), MESH_AXES)
        rows = local_rows(mesh, 8)
        batch = from_rows(whole[rows], mesh)
        assert batch.shape == whole.shape
        for shard in batch.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
        assert sum_over_rows(sum(row in (1, 4, 5) for row in rows), mesh) == 3
        found.append(rows)
    print(found)
"""


def test_the_batch_of_the_rows_that_each_process_has_loaded():
    address, everything = free_address(), list(range(8))
    processes = [start(4, "-c", textwrap.dedent(ROWS), address, i) for i in (0, 1)]
    first, second = (json.loads(finish(process).splitlines()[-1]) for process in processes)
    assert first == [[0, 1, 2, 3]] * 3 + [everything, [0, 2, 4, 6], everything]
    assert second == [[4, 5, 6, 7]] * 3 + [everything, [1, 3, 5, 7], everything]


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
