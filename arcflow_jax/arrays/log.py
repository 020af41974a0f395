"""Which of Orbax's log lines are left out: those of errors that it also raises."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

# Where Orbax logs a failed save's error, with its traceback, before it raises it
RAISING = ("future.py", "async_checkpointer.py", "checkpoint_manager.py")


def raised_later(record: logging.LogRecord) -> bool:
    """Whether Orbax logs the error of a failed save, which `Checkpoints` raises."""
    file = Path(record.pathname)
    return "orbax" in file.parts and file.name in RAISING and record.levelno == logging.ERROR and bool(record.exc_info)


def of_a_reader(record: logging.LogRecord) -> bool:
    """Whether this is a warning or error of Orbax about a checkpoint that it reads. It also raises what matters."""
    return "orbax" in Path(record.pathname).parts and record.levelno >= logging.WARNING


@contextlib.contextmanager
def without(unwanted: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Inside the `with` block, Orbax does not log the records that `unwanted` names."""
    log = logging.getLogger("absl")

    def is_other(record: logging.LogRecord) -> bool:
        return not unwanted(record)

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)
