"""Short training runs of the bundled FLUX.1 teacher, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np

from arcflow_jax.checkpoints.training import Checkpoints
from arcflow_jax.training.recipe import Recipe, read_config

PROMPTS = ["a red circle", "a green square", "a blue ring on the left", "a large yellow triangle"]


# All tests train on this where the numbers do not matter to them: the programs of a training step are compiled once
SETTINGS = {
    **{"resolutions": ((32, 32),), "batch": 8, "steps": 4, "log_every": 1, "save_every": 2, "mesh": (1, 1, 1, 1)},
    **{"preview_every": 0, "adapter.modes": 3, "adapter.rank": 2, "adapter.dropout": 0.1},
    # One phase: the teacher's share falls, and does not reach zero
    **{"distillation.decay": 1000, "distillation.states": 2},
    # So that two steps show, and tell EMA weights from raw ones
    **{"optimizer.learning_rate": 2e-3, "optimizer.warmup": 0, "ema.start": 0, "ema.power": 1.0},
}


def settings(model: Path, out: Path) -> dict[str, object]:
    """The tiny recipe, cut down to training steps of a fraction of a second."""
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    return {"model": str(model), "prompts": str(prompts), "out": str(out), **SETTINGS}


def overrides(model: Path, out: Path, **changes: object) -> list[str]:
    """It on the command line."""
    return [f"--config.{name}={value}" for name, value in (settings(model, out) | changes).items()]


def recipe(model: Path, out: Path, **changes: object) -> Recipe:
    """It as a recipe. A change has a setting's name, with dots or as a dict of dicts."""
    config = read_config("tiny")
    with config.unlocked():
        config.update_from_flattened_dict(settings(model, out) | {k: v for k, v in changes.items() if "." in k})
        config.update({k: v for k, v in changes.items() if "." not in k})
    return Recipe.from_config(config)


def losses(run: Path) -> list[float]:
    """The loss of each line of a run's log."""
    return [line["loss"] for line in log(run)]


def log(run: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def saved(run: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint."""
    with Checkpoints(run, read_only=True) as checkpoints:
        restored = checkpoints.manager.restore(checkpoints.latest)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(restored)}
