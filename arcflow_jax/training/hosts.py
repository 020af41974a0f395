"""Whether the processes of a run see the same things: one directory, the same prompts, recipe and model."""

from __future__ import annotations

import contextlib
import secrets
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from arcflow_jax.errors import UserError
from arcflow_jax.storage.files import digest
from arcflow_jax.training.plan import Plan

NONCE = ".shared"  # in the run's directory
PATIENCE = 10  # seconds until a file of another host has to be seen
PLACES = {"model", "prompts", "images", "embeddings", "start_from"}  # of a recipe; each host may have its own copy


def check_plan(plan: Plan) -> None:
    """Raises UserError in all processes if one has other prompts, another recipe or another model than the first."""
    if jax.process_count() == 1:
        return
    recipe = {name: value for name, value in plan.recipe.resolved().items() if name not in PLACES}
    images = [(image.file.name, image.caption) for image in plan.images or ()]
    seen = {
        f"the prompts, of which the first process has {len(plan.prompts.texts)},": [
            plan.prompts.texts,
            plan.prompts.sizes,
            images,
        ],
        "the settings of the recipe": [recipe],
        "the weights of the model": [plan.directory.fingerprint],
    }
    for what, values in seen.items():
        own = gathered(np.frombuffer(bytes.fromhex(digest(values)), np.uint8))
        if other := [i for i, each in enumerate(own) if (each != own[0]).any()]:
            raise UserError(f"{what} differ on {processes(other)}: all hosts have to start from the same")


def check_directory(run: Path) -> None:
    """Raises UserError in all processes if one does not see what the first one writes to the run's directory.

    All processes call it, once the first one has made the directory.
    """
    if jax.process_count() == 1:
        return
    blind = [i for i, sees in enumerate(gathered(np.array(sees_the_first(run)))) if not sees]
    if jax.process_index() == 0:
        (run / NONCE).unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"{run} is not the same directory on all hosts: {processes(blind)} cannot see what process 0 writes there; "
            "name a directory on a shared disk or in a bucket as --config.out"
        )


def sees_the_first(run: Path) -> bool:
    """Whether this process reads what the first one has just written to a directory."""
    nonce = np.frombuffer(secrets.token_bytes(16), np.uint8)
    if jax.process_index() == 0:
        (run / NONCE).write_bytes(nonce.tobytes())
    expected = np.asarray(multihost_utils.broadcast_one_to_all(nonce)).tobytes()
    end = time.monotonic() + PATIENCE  # a shared disk may show a new file late
    while True:
        with contextlib.suppress(OSError):
            if (run / NONCE).read_bytes() == expected:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def gathered(values: np.ndarray) -> np.ndarray:
    """The values of each process, [processes, …]."""
    return np.asarray(multihost_utils.process_allgather(values))


def processes(numbers: list[Any]) -> str:
    """The numbers of processes, for an error message."""
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
