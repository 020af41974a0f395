"""The errors that a user can correct, and how the command line reports them."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Generator, Sequence

SHOWN = 4  # names that an error message spells out
LONGEST = 1000  # characters of an error message; a name that it quotes has at most 200
TRACEBACK = "ARCFLOW_TRACEBACK"  # environment variable: 1 shows the traceback of a UserError


class UserError(ValueError):
    """Bad input. The message is one line that says what was wrong and what would be right.

    It has no line breaks or control codes, whatever the names and paths that it quotes. The command line prints it
    without a traceback and exits with code 2; with ARCFLOW_TRACEBACK=1 it prints the traceback first, with the error
    that caused this one.
    """

    def __init__(self, message: object):
        text = printable(str(message))
        # The end says what would be right
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 + 3 :]}")


class NetworkError(UserError):
    """A network or a service did not answer. The command line exits with code 1: the same command may succeed later."""


class Preempted(Exception):
    """SIGTERM arrived, and the run has saved a checkpoint. The message says where.

    The command line prints the message and exits with code 143, as a process does that SIGTERM has ended: the run is
    not finished, and a scheduler has to start it again.
    """


def exit_code(error: BaseException) -> int:
    """What a command exits with after an exception: 2 if the user can correct it, 143 after SIGTERM, 130 after Ctrl-C.

    All others are 1. Python prints their traceback.
    """
    codes = {NetworkError: 1, UserError: 2, Preempted: 143, KeyboardInterrupt: 130}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


@contextlib.contextmanager
def report_errors() -> Generator[None]:
    """Around a command: prints a `UserError` as one line on stderr, `Preempted` on stdout, and exits with `exit_code`.

    Other exceptions pass through.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            traceback.print_exception(with_causes(error))
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code(error))
    except Preempted as preempted:
        print(preempted, flush=True)
        sys.exit(exit_code(preempted))
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(exit_code(interrupt))


def with_causes(error: BaseException) -> BaseException:
    """The same error; its traceback also shows the errors that `raise … from None` hides."""
    cause: BaseException | None = error
    while cause is not None:
        cause.__suppress_context__ = cause.__cause__ is not None
        cause = cause.__cause__ or cause.__context__
    return error


def printable(text: str) -> str:
    """A text on one line, with control codes, such as a terminal's escape code, spelled out: \\x1b for ESC."""
    if text.isprintable():
        return text
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def one_line(error: object) -> str:
    """The message of another library's exception, or a name or value from a file, to be quoted: on one line, printable,
    and cut to 200 characters."""
    return printable(str(error)[:1000])[:200]


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one that caused it, is XLA's report that a device's memory is full."""
    return error is not None and ("RESOURCE_EXHAUSTED" in str(error) or out_of_memory(error.__cause__))


def of_files(text: str, error: OSError) -> UserError:
    """The error for a file that cannot be read or written: NetworkError if it is in a bucket that does not answer."""
    kind = NetworkError if isinstance(error, ConnectionError) else UserError
    return kind(f"{text}: {one_line(error.strerror or error)}")


# How exceptions of Python, XLA, TensorStore and the clients of buckets show their cause
CAUSES = {
    "memory": ("RESOURCE_EXHAUSTED", "MemoryError", "Cannot allocate memory"),
    "permission": ("PERMISSION_DENIED", "UNAUTHENTICATED", "PermissionError", "ermission denied", "Forbidden"),
    "network": (
        *("UNAVAILABLE", "DEADLINE_EXCEEDED", "ConnectionError", "TimeoutError", "timed out", "CURL error"),
        *("Connection reset", "Connection refused", "Could not resolve", "name resolution"),
    ),
}


def cause_of(error: BaseException) -> str | None:
    """Why something could not be read or written: a key of `CAUSES`, None for all other reasons, such as damage."""
    seen: BaseException | None = error
    while seen is not None:
        text = f"{' '.join(kind.__name__ for kind in type(seen).__mro__)}: {seen}"
        for cause, signs in CAUSES.items():
            if any(sign in text for sign in signs):
                return cause
        seen = seen.__cause__ or seen.__context__
    return None


def cannot_load(what: str, error: BaseException, advice: str = "") -> UserError:
    """The error of something that could not be loaded. Only what is damaged is called so, and gets the advice."""
    reason = one_line(error).partition(" See full TensorStore details")[0]
    match cause_of(error):
        case "memory":
            return UserError(f"out of memory while {what} is loaded, use more devices or a larger fsdp: {reason}")
        case "permission":
            return UserError(f"no permission to read {what}: {reason}")
        case "network":
            return NetworkError(f"{what} cannot be reached, try again: {reason}")
    return UserError(f"{what} is damaged{advice}: {reason}")


def first_few(items: Sequence[str]) -> str:
    """The first names of a list, for an error message."""
    return ", ".join(map(one_line, items[:SHOWN])) + (", …" if len(items) > SHOWN else "")
