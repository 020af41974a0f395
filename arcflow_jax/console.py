"""What the user sees while something long goes on: one progress bar for all commands, and durations."""

from __future__ import annotations

import sys

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


def progress_bar(*, of_bytes: bool = False, transient: bool = False, disable: bool = False) -> Progress:
    """A bar on stderr, shown on a terminal only: description, how much of the whole, time spent and left.

    A task may have a field `text`, which stands at the end of its line. What is printed to stdout scrolls by above the
    bar where both are the same terminal.

    Args:
      of_bytes: amounts are bytes; otherwise counts.
      transient: takes the bar away at the end.
      disable: shows nothing, as on all processes of a run but the first.
    """
    console = Console(stderr=True)
    amounts: list[ProgressColumn] = (
        [DownloadColumn(binary_units=True), TransferSpeedColumn()] if of_bytes else [MofNCompleteColumn()]
    )
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *amounts,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=console,
        transient=transient,
        redirect_stdout=sys.stdout.isatty(),
        disable=disable or not console.is_interactive,
    )


def duration(seconds: float) -> str:
    """A time as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
