"""Short training runs of the bundled FLUX.1 teacher, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np

from arcflow_jax.checkpoints.training import Checkpoints
from arcflow_jax.training.recipe import Recipe, read_config

PROMPTS = ["a red circle", "a green square", "a blue ring on the left", "a large yellow triangle"]


def recipe(model: Path, out: Path, **changes: object) -> Recipe:
    """The tiny recipe, cut down."""
    config = read_config("tiny")
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    with config.unlocked():
        config.update(model=str(model), prompts=str(prompts), out=str(out), resolutions=((32, 32),), batch=8, steps=4)
        config.update(log_every=1, save_every=2, mesh=(1, 1, 1, 1), preview_every=0)
        config.adapter.update(modes=3, rank=2, dropout=0.1)
        config.distillation.update(decay=3, states=2)
        config.update(changes)
    return Recipe.from_config(config)


def losses(run: Path) -> list[float]:
    """The loss of each line of a run's log."""
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def saved(run: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint."""
    with Checkpoints(run, read_only=True) as checkpoints:
        restored = checkpoints.manager.restore(checkpoints.latest)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(restored)}
