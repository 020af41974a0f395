"""A stand-in for `evaluate.comparison.Comparison` that needs no model."""

from __future__ import annotations

import types
from collections.abc import Sequence

import numpy as np

from arcflow_jax.evaluate.trajectory.figures import Grid


class FakeComparison:
    """Returns sizes that depend only on a prompt's number; remembers at which prompts its batches started."""

    identity = {"seed": 1, "steps": 2, "teacher_steps": 4}  # noqa: RUF012
    origin = {"model": "none"}  # noqa: RUF012
    encode = types.SimpleNamespace(cut=0)
    grid = Grid.between(np.linspace(1, 0, 5), np.array([1.0, 0.5, 0.0]))

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.firsts: list[int] = []

    def __call__(self, prompts: Sequence[str], first: int) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
        self.firsts.append(first)
        number = 1.0 + first + np.arange(len(prompts))
        points = 1 + np.arange(len(self.grid.sigma))[:, None]
        names = ("total", "local", "drift", "cross")
        sizes = {
            kind: {name: points * number / (1 + i) for i, name in enumerate((*names, *more))}
            for kind, more in {"velocity": ("teacher",), "state": ("closed_form", "displacement")}.items()
        }
        return sizes, 2 * number
