"""Weights & Biases: the lines of the log and the previews once more, if the recipe names a project.

It is optional: whatever fails here is a warning, and the run trains without it. What could not be sent is sent later.
"""

from __future__ import annotations

import importlib
import uuid
from pathlib import Path
from typing import Any

from PIL import Image

from arcflow_jax.console import optional
from arcflow_jax.errors import one_line
from arcflow_jax.storage.files import read_json, write_json
from arcflow_jax.storage.paths import in_bucket
from arcflow_jax.training.recipe import Recipe

MOST_WAITING = 1000  # what could not be sent and is kept, so that a service that is gone fills no memory


class WandbLog:
    """A run in Weights & Biases, resumed there if this run is.

    Everything is drawn over "step", a metric of ours: Weights & Biases' own step never goes back, and drops what is
    logged to an earlier one, as a resumed run does.

    Args:
      lines: scalars of the training steps before this start. Those that did not arrive are sent again: a killed
        process may have lost them.
    """

    def __init__(self, run: Path, recipe: Recipe, lines: list[dict[str, Any]]):
        self.waiting: list[dict[str, Any]] = []
        self.started: Any = None
        with optional("Weights & Biases"):
            self.started = start(run, recipe)
            arrived = self.started.summary.get("step", 0)
            self.waiting = [line for line in lines if line["step"] > arrived]
        self.send()

    def log(self, values: dict[str, Any]) -> None:
        """Sends values, with their "step", after those that are still waiting."""
        if self.started is not None:
            self.waiting = [*self.waiting, values][-MOST_WAITING:]
            self.send()

    def image(self, step: int, image: Image.Image) -> None:
        """Sends a preview."""
        with optional("Weights & Biases"):
            if self.started is not None:
                self.log({"step": step, "preview": importlib.import_module("wandb").Image(image)})

    def send(self) -> None:
        """Sends what waits, as far as possible."""
        with optional("Weights & Biases"):
            while self.waiting:
                self.started.log(self.waiting[0])
                del self.waiting[0]

    def finish(self) -> None:
        """Ends the run there."""
        self.send()
        with optional("Weights & Biases"):
            if self.started is not None:
                self.started.finish()


def start(run: Path, recipe: Recipe) -> Any:
    """The run there. Raises whatever `wandb` does."""
    wandb = importlib.import_module("wandb")
    known = run / "wandb.json"
    if not known.exists():
        write_json(known, {"id": uuid.uuid4().hex[:8]})
    started = wandb.init(
        project=recipe.wandb_project,
        name=run.name,
        id=one_line(read_json(known).get("id")),
        resume="allow",
        dir=None if in_bucket(run) else str(run),
        config=recipe.resolved(),
    )
    started.define_metric("*", step_metric="step")
    return started
