"""A run that is told to end before it is done, as schedulers do before they take a machine away."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Listens for SIGTERM while its `with` block runs, which it no longer ends.

    Of several processes any may get the signal: JAX's preemption service hears it, and makes all of them agree on an
    iteration. A process that is alone listens itself.
    """

    def __init__(self) -> None:
        self.told = False

    def __enter__(self) -> Preemption:
        # Python can set handlers in its main thread only
        self.listens = not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread()
        if self.listens:
            self.before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        if self.listens:
            signal.signal(signal.SIGTERM, self.before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.told = True

    def reached(self, step: int) -> bool:
        """Whether to save and end after this many iterations. All processes have to ask after each iteration."""
        return self.told or multihost_utils.reached_preemption_sync_point(step)
