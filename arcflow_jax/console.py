"""The progress bar of all commands, warnings, and how durations are printed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from arcflow_jax.errors import one_line


@contextlib.contextmanager
def optional(what: str) -> Generator[None]:
    """Inside the `with` block, an error is printed as a warning on stderr: the caller does not need what fails."""
    try:
        yield
    except Exception as error:
        print(f"warning: {what}: {type(error).__name__}: {one_line(error)}", file=sys.stderr, flush=True)


def progress_bar(*, of_bytes: bool = False, transient: bool = False, disable: bool = False) -> Progress:
    """A bar on stderr: description, amount done and total, elapsed and remaining time. It shows on a terminal only.

    A task has a field `text`, which is shown at the end of its line. Where stdout and stderr are the same terminal,
    lines that are printed to stdout appear above the bar.

    Args:
      of_bytes: amounts are bytes; otherwise counts.
      transient: removes the bar at the end.
      disable: shows nothing. Only the first process of a run shows a bar.
    """
    console = Console(stderr=True)
    amounts: list[ProgressColumn] = (
        [DownloadColumn(binary_units=True), TransferSpeedColumn()] if of_bytes else [MofNCompleteColumn()]
    )
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *amounts,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
        transient=transient,
        redirect_stdout=sys.stdout.isatty(),
        disable=disable or not console.is_interactive,
    )


def duration(seconds: float) -> str:
    """A duration as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
