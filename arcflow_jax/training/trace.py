"""A JAX trace of a few iterations, for TensorBoard's profiler, XProf or Perfetto."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

from arcflow_jax.errors import UserError


class Trace:
    """Records iterations first … last, counted from 1, both included.

    Args:
      text: "A:B", or None for no trace.
      folder: for the trace.
    """

    def __init__(self, text: str | None, folder: Path):
        self.folder, self.running = folder, False
        self.first = self.last = 0
        if text is not None:
            found = re.fullmatch(r"(\d+):(\d+)", text)
            self.first, self.last = map(int, found.groups()) if found else (0, 0)
            if not 1 <= self.first <= self.last:
                raise UserError(f"profile {text!r} is not A:B, the first and the last iteration, counted from 1")

    def check(self, done: int, steps: int) -> None:
        """Raises UserError unless a run that goes on after `done` of `steps` iterations makes those to be traced."""
        if self.first and not done < self.first <= self.last <= steps:
            raise UserError(
                f"profile {self.first}:{self.last}: this run makes iterations {done + 1} to {steps}, and no others"
            )

    def before(self, iteration: int) -> None:
        """To be called before each iteration."""
        if iteration == self.first:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, iteration: int, result: Any) -> None:
        """To be called with what each iteration leaves."""
        if iteration == self.last and self.running:
            jax.block_until_ready(result)
            self.stop()

    def stop(self) -> None:
        """Writes the trace, if one is being recorded."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
