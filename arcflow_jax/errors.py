"""The exceptions that the command line knows: what a user can put right, and a run that was told to end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

SHOWN = 4  # names that an error message spells out


class UserError(Exception):
    """Bad input: the message is one line that says what was wrong and what would be right.

    The command line prints it without a traceback and exits with code 2.
    """


class Preempted(Exception):
    """A run was told to end (SIGTERM), and has saved itself: the message says where.

    The command line prints it and exits with code 0.
    """


@contextlib.contextmanager
def told_in_a_line() -> Iterator[None]:
    """Around a command: what a user can put right is one line on stderr, and its exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Preempted as told:
        print(told)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def one_line(error: object) -> str:
    """What another library's exception (or a value) says, on one line and cut short, for a UserError to quote."""
    return " ".join(str(error).split())[:200]


def out_of_memory(error: BaseException | None) -> bool:
    """Whether a device's full memory is behind an exception, in XLA's words."""
    return error is not None and ("RESOURCE_EXHAUSTED" in str(error) or out_of_memory(error.__cause__))


def first_few(items: Sequence[str]) -> str:
    """Some names for an error message, cut to the first few."""
    return ", ".join(items[:SHOWN]) + (", …" if len(items) > SHOWN else "")
