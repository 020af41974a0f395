"""One hostile input: what is run, how it ended, and whether it should have ended so."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import logging
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from arcflow_jax.errors import UserError

SECONDS = float(os.environ.get("HOSTILE_SECONDS", "20"))  # more is a hang
MEMORY = 2 << 30  # bytes that a case may allocate
LONGEST = 1000  # characters of an error
GOOD = ("told", "right")
OUTCOMES = (*GOOD, "unclear", "wrong", "traceback", "hang", "leftover")


def refused(result: Any) -> str:
    """The judge of an input that has to be refused."""
    return "accepted, but has to be refused"


@dataclasses.dataclass
class Case:
    """A hostile input.

    Attributes:
      what: what was damaged, and how.
      run: reads it.
      names: of which the error has to contain one: the file, or the field.
      wrong: given what `run` returned, why that is wrong; None if it is right.
      inputs: folder that has to stay as it is.
      work: folder for outputs, where nothing may be left after a refusal.
      harmless: whether nothing is wrong with it, so that it must not be refused.
    """

    what: str
    run: Callable[[], Any]
    names: Sequence[str]
    wrong: Callable[[Any], str | None] = refused
    inputs: Path | None = None
    work: Path | None = None
    harmless: bool = False


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a case ended: one of `OUTCOMES`, the error or what was wrong, and a short name of the cause."""

    outcome: str
    detail: str
    cause: str = ""


class Told(Exception):
    """A command exited with code 2; the message is what it wrote to stderr, without "error: "."""


class Hang(BaseException):
    """The time is over."""


def command(*arguments: object) -> str:
    """Runs the command line in this process and returns what it printed. Raises Told if it refuses."""
    from arcflow_jax.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code or 0
    text = err.getvalue()
    if code == 2 and (usage := re.fullmatch(r"Usage: [^\n]*\n(?:Try [^\n]*\n)?\nError: ([^\n]*)\n", text)):
        raise Told(usage[1])  # of typer's, about an option's form
    if code == 2 and text.startswith("error: ") and text.endswith("\n"):
        raise Told(text.removeprefix("error: ")[:-1])
    if code or text:
        raise AssertionError(f"exit code {code}, stderr {text[:500]!r}")
    return out.getvalue()


def fault_of(message: str, names: Sequence[str]) -> str | None:
    """What is wrong with an error's text."""
    if "\n" in message:
        return "has several lines"
    if odd := sorted({character for character in message if not (character.isprintable() or character == "\xa0")}):
        return f"has control characters {''.join(odd)[:20]!r}"
    if len(message) > LONGEST:
        return f"has {len(message)} characters"
    if not any(name in message for name in names):
        return f"names none of {', '.join(map(repr, names))}"
    return None


def snapshot(folder: Path | None) -> dict[str, tuple]:
    """Name, kind, size and time of everything in a folder; of directories, their kind."""
    found: dict[str, tuple] = {}
    for parent, directories, files in os.walk(folder or "/nonexistent"):
        for name in [*directories, *files]:
            path = os.path.join(parent, name)
            stat = os.lstat(path)
            is_directory = name in directories and not os.path.islink(path)
            found[os.path.relpath(path, folder)] = (
                (stat.st_mode,) if is_directory else (stat.st_mode, stat.st_size, stat.st_mtime_ns)
            )
    return found


def difference(before: dict[str, tuple], after: dict[str, tuple]) -> str | None:
    """What has appeared, gone or changed."""
    kinds = (
        ("new", sorted(after.keys() - before.keys())),
        ("gone", sorted(before.keys() - after.keys())),
        ("changed", sorted(name for name in before.keys() & after.keys() if before[name] != after[name])),
    )
    return "; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in kinds if names) or None


class Noise(logging.Handler):
    """Collects warnings and errors that libraries log."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], str]]:
    """Ends what takes too long or too much memory; collects all that reaches stderr or a log. Yields its reader."""

    def over(*_: Any) -> None:
        raise Hang

    noise, saved, failed = Noise(), os.dup(2), []
    hook, old_limits = threading.excepthook, resource.getrlimit(resource.RLIMIT_DATA)
    with tempfile.TemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=ResourceWarning)
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        threading.excepthook = lambda error: failed.append(f"Traceback in a thread: {error.exc_type.__name__}")
        logging.getLogger().addHandler(noise)
        own = io.TextIOWrapper(os.fdopen(os.dup(2), "wb", 0), "utf-8", "backslashreplace", write_through=True)

        def read() -> str:
            file.seek(0)
            return "\n".join([*noise.lines, *failed, file.read().decode(errors="replace")]).strip()

        old = signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)  # again, if a destructor swallows it
        resource.setrlimit(resource.RLIMIT_DATA, (data_size() + MEMORY, old_limits[1]))
        try:
            with contextlib.redirect_stderr(own), contextlib.redirect_stdout(io.StringIO()):
                yield read
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
            resource.setrlimit(resource.RLIMIT_DATA, old_limits)
            logging.getLogger().removeHandler(noise)
            threading.excepthook = hook
            os.dup2(saved, 2)
            os.close(saved)


def data_size() -> int:
    """The bytes of this process that RLIMIT_DATA counts."""
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


def run(case: Case) -> Ending:
    """Runs a case and says how it ended."""
    inputs, work = snapshot(case.inputs), snapshot(case.work)
    error: BaseException | None = None
    result = None
    noise = ""
    with watched() as read:
        try:
            try:
                result = case.run()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (Exception, Hang, SystemExit) as caught:
            error = caught
        noise = read()
    if (changed := difference(inputs, snapshot(case.inputs))) is not None:
        return Ending("leftover", f"the input is not as it was: {changed}", "input changed")
    if isinstance(error, Hang | MemoryError):
        return Ending(
            "hang", f"{type(error).__name__} {error} {case.what}", f"{type(error).__name__} in {place(error)}"
        )
    if isinstance(error, UserError | Told):
        message = str(error)
        if (left := difference(work, snapshot(case.work))) is not None:
            return Ending(
                "leftover", f"{left}, after: {message[:300]}", f"leftover: {re.sub('[0-9]+', '#', left)[:60]}"
            )
        if (fault := fault_of(message, case.names)) is not None:
            return Ending("unclear", f"{fault}: {message[:400]!r}", f"the error {fault[:40]}, raised in {place(error)}")
        if noise:
            return Ending("traceback", f"noise on stderr: {noise[:600]}", f"noise: {noise[:60]}")
        if case.harmless:
            return Ending("wrong", f"refused, though nothing is wrong: {message[:300]}", f"refused in {place(error)}")
        return Ending("told", message)
    if error is not None:
        text = f"{type(error).__name__}: {str(error)[:300]}"
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        trace = " → ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
        return Ending("traceback", f"{text}\n{trace}", f"{type(error).__name__} in {place(error)}")
    if noise:
        return Ending("traceback", f"noise on stderr: {noise[:600]}", f"noise: {noise[:60]}")
    try:
        fault = case.wrong(result)
    except Exception as unjudged:
        fault = f"cannot be judged: {type(unjudged).__name__}: {unjudged} in {place(unjudged)}"
    del result
    gc.collect(0)
    return Ending("right", "") if fault is None else Ending("wrong", fault, f"accepted: {fault[:70]}")


def place(error: BaseException) -> str:
    """The innermost function of the library in a traceback, as file:function."""
    where = "outside the library"
    for frame in traceback.extract_tb(error.__traceback__):
        if "arcflow_jax" in frame.filename and "site-packages" not in frame.filename:
            path = frame.filename.partition("arcflow_jax/")[2] or frame.filename
            where = f"{path.rpartition('arcflow_jax/')[2]}:{frame.name}"
    return where
