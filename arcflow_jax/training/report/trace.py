"""A JAX trace of a few training steps, for TensorBoard's profiler, XProf or Perfetto."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import jax

from arcflow_jax.console import optional
from arcflow_jax.errors import UserError
from arcflow_jax.storage.paths import written_locally


class Trace:
    """Records training steps A to B, counted from 1, both included.

    It is optional: what fails while the run trains is a warning.

    Args:
      text: "A:B", or None for no trace.
      folder: to write the trace to.

    Raises:
      UserError: if the text is not A:B.
    """

    def __init__(self, text: str | None, folder: Path):
        self.folder, self.running, self.files = folder, False, contextlib.ExitStack()
        self.first = self.last = 0
        if text is not None:
            found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
            self.first, self.last = map(int, found.groups()) if found else (0, 0)
            if not 1 <= self.first <= self.last:
                raise UserError(f"profile {text!r} is not A:B, the first and the last training step, counted from 1")

    def check(self, done: int, steps: int) -> None:
        """Raises UserError unless all traced training steps are among those left of `steps` after `done`."""
        if self.first and not done < self.first <= self.last <= steps:
            raise UserError(
                f"profile {self.first}:{self.last} is outside the training steps of this run, {done + 1} to {steps}"
            )

    def before(self, step: int) -> None:
        """Call it before each training step."""
        if step == self.first:
            with optional("the trace was not begun"), contextlib.ExitStack() as files:
                jax.profiler.start_trace(str(files.enter_context(written_locally(self.folder))))
                self.files, self.running = files.pop_all(), True

    def after(self, step: int, result: Any) -> None:
        """Call it after each training step, with its result."""
        if step == self.last and self.running:
            jax.block_until_ready(result)
            self.stop()

    def stop(self) -> None:
        """Writes the trace, if one is being recorded."""
        if self.running:
            self.running = False
            with optional("the trace was not written"), self.files:
                jax.profiler.stop_trace()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
