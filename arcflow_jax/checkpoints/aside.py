"""Checkpoints that a run no longer resumes from are not deleted: they move to RUN/checkpoints-aside/."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from arcflow_jax.storage.paths import in_bucket

COMMITTED = "commit_success.txt"  # Orbax's mark of a complete checkpoint in a bucket
ASIDE = "checkpoints-aside"


def move_aside(run: Path, steps: Sequence[int]) -> None:
    """Moves checkpoints of a run. All processes call it, the first one moves. Raises OSError."""
    if jax.process_index() == 0:
        (run / ASIDE).mkdir(exist_ok=True)
        for step in steps:
            names = itertools.chain([str(step)], (f"{step}-{i}" for i in itertools.count(2)))
            free = next(name for name in names if not (run / ASIDE / name).exists())
            move(run / "checkpoints" / str(step), run / ASIDE / free)
        print(f"moved checkpoints newer than the one to resume from to {run / ASIDE}: {', '.join(map(str, steps))}")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("checkpoints moved aside")


def move(checkpoint: Path, to: Path) -> None:
    """Moves one checkpoint. What is at either name is complete, or has no mark of Orbax. Raises OSError."""
    if not in_bucket(checkpoint):
        checkpoint.rename(to)
        return
    # A bucket cannot rename. The mark goes first at the old name, and comes last at the new one
    mark = checkpoint / COMMITTED
    for path in checkpoint.sizes():
        if path != mark:
            path.copy_to(to / str(path.relative_to(checkpoint)))
    mark.copy_to(to / COMMITTED)
    mark.unlink()
    checkpoint.rmtree()
