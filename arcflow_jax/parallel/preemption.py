"""Preemption: the scheduler sends SIGTERM before it takes a machine away."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Inside the `with` block, SIGTERM sets a flag instead of killing the process.

    With several processes, any of them may get the signal. Then JAX's preemption service handles it, and makes all
    processes agree on a training step. A single process handles the signal here.
    """

    def __init__(self) -> None:
        self.preempted = False

    def __enter__(self) -> Preemption:
        # Python sets signal handlers in the main thread only
        self.handles = not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread()
        if self.handles:
            self.previous = signal.signal(signal.SIGTERM, self._set)
        return self

    def __exit__(self, *error: object) -> None:
        if self.handles:
            signal.signal(signal.SIGTERM, self.previous)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.preempted = True

    def reached(self, step: int) -> bool:
        """Whether to save and stop after this training step. All processes have to ask after each step."""
        return self.preempted or multihost_utils.reached_preemption_sync_point(step)
