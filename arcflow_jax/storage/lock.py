"""One writer an output: whoever writes a directory or file holds a lock on it meanwhile.

The lock is a file beside the output, `.NAME.lock`, with process id and host of its writer. It is removed at the end. A
lock that a killed process has left on the same host is taken over. On another host nobody can tell whether the process
still runs, so the error names the file to remove. In a bucket it is a lease, see `lease`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import SoftFileLock, Timeout

from arcflow_jax.errors import UserError, of_files
from arcflow_jax.storage.paths import in_bucket

if TYPE_CHECKING:
    from arcflow_jax.storage.bucket import BucketPath

NAME_BYTES = 200  # of an output's name in a hidden name: 255 are allowed, and endings have room in the rest
POLL_SECONDS = 0.5  # of a writer that waits
_held: list[Path] = []  # what this process writes
_locks: list[Path] = []  # lock files of this process


@contextlib.contextmanager
def one_writer(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Inside the `with` block this is the only process, and thread, that writes `out`. Blocks may be nested.

    Directories above `out` that do not exist are made, and removed at the end if they are still empty.

    Args:
      out: the directory or file to write, which need not exist.
      wait: waits for another writer instead of refusing.

    Raises:
      UserError: if another process writes `out`, `out` is a link, or nothing can be written beside it.
    """
    check_place(out)
    out = named(out)
    if in_bucket(out):
        with holding(out, wait):
            yield
        return
    lock = SoftFileLock(hidden(out, "lock"), is_singleton=True)  # a singleton can be acquired again by its thread
    with contextlib.ExitStack() as stack:
        try:
            stack.callback(remove_empty, make_parents(out))
            acquire(lock, out, wait)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}") from error
        stack.callback(lock.release)
        _locks.append(file := Path(lock.lock_file))
        stack.callback(_locks.remove, file)
        stack.enter_context(writing(out))
        yield


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Inside the `with` block this process writes `out`, whose lock it holds, or the first process of its run."""
    out = named(out)
    _held.append(out)
    try:
        yield
    finally:
        _held.remove(out)


@contextlib.contextmanager
def holding(out: BucketPath, wait: bool) -> Iterator[None]:
    """`one_writer` in a bucket."""
    from arcflow_jax.storage import lease  # not at the top: it takes time, and few need it
    from arcflow_jax.storage.bucket import BucketPath

    place = BucketPath(hidden(out, "lock"))
    try:
        while True:
            try:
                release = lease.acquire(place)
                break
            except lease.Held as error:
                text = describe(out, place, error.holder.who if error.holder is not None else None)
                if not wait:
                    raise UserError(text) from None
                print(f"waiting: {text}", flush=True)
                time.sleep(POLL_SECONDS)
    except OSError as error:
        raise of_files(f"cannot write {out}", error) from error
    try:
        yield
    finally:
        release()


def abandon() -> None:
    """Removes this process's lock files, if it ends without leaving its `with` blocks. A lease expires by itself."""
    for file in _locks:
        with contextlib.suppress(OSError):
            file.unlink()


def is_writer(path: Path) -> bool:
    """Whether this process is the one writer of a path, or of a directory above it, which may be unfinished."""
    around = {path := named(path), *path.parents}
    return any({out, unfinished_name(out)} & around for out in _held)


def unfinished_name(out: Path) -> Path:
    """Where what the next writer resumes from is collected, beside `out`."""
    return hidden(out, "incomplete")


def named(path: Path) -> Path:
    """The same path, absolute and without links in the directories above it."""
    if in_bucket(path):
        return path
    return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()


def hidden(path: Path, ending: str) -> Path:
    """A hidden name beside `path`, of at most 255 bytes whatever the length of its name."""
    name = path.name
    if len(name.encode()) > NAME_BYTES:
        unique = hashlib.sha256(name.encode()).hexdigest()[:16]
        name = f"{cut_to_bytes(name, NAME_BYTES - 17)}~{unique}"
    return path.with_name(f".{name}.{ending}")


def cut_to_bytes(text: str, most: int) -> str:
    """The longest beginning of a text that has at most so many bytes in UTF-8."""
    return text.encode()[:most].decode(errors="ignore")


def check_place(out: Path) -> None:
    """Raises UserError if an output is a link, as what it leads to would be written in its place, or lies in a file."""
    if in_bucket(out):
        if len(out.parts) < 4:
            raise UserError(f"cannot write {out}: name a path in the bucket, {out}/NAME")
        return
    try:
        link = os.readlink(out) if out.is_symlink() else None
        file = next((parent for parent in out.parents if parent.is_file()), None)
    except OSError as error:  # a name that is too long
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    if link is not None:
        raise UserError(f"{out} is a link: name what it leads to, {link}, or remove the link")
    if file is not None:
        raise UserError(f"cannot write {out}: {file} is not a directory")


def acquire(lock: SoftFileLock, out: Path, wait: bool) -> None:
    """Takes the lock of `out`. Raises UserError if another holds it, and OSError."""
    file = Path(lock.lock_file)
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout:
            if not os.path.lexists(file):  # released meanwhile
                continue
        if not wait:
            raise UserError(held_by(out, file))
        print(f"waiting: {held_by(out, file)}", flush=True)
        lock.acquire(timeout=-1, poll_interval=POLL_SECONDS)
        return


def held_by(out: Path, file: Path) -> str:
    """Who writes `out`, and what to do, from its lock file."""
    holder = read_holder(file)
    for _ in range(20):  # a writer makes its lock file, and then writes its name into it
        if holder or not os.path.lexists(file):
            break
        time.sleep(0.05)
        holder = read_holder(file)
    return describe(out, file, holder)


def describe(out: Path, file: Path, holder: tuple[int, str, float] | None) -> str:
    """Who writes `out`, its process id, host and since when, and what to do."""
    if holder is None:
        return f"{out} is locked by {file}, which names no process: remove it if nothing writes {out}"
    process, host, since = holder
    here = host == socket.gethostname()
    who = "this process" if here and process == os.getpid() else f"process {process} on {host}"
    text = f"{out} is being written by {who} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))}"
    if here or in_bucket(out):
        return f"{text}: wait for it, or name another"
    return f"{text}: if that process is dead, remove {file}"


def read_holder(file: Path) -> tuple[int, str, float] | None:
    """Process id, host and time of a lock file; None if it is not a lock file."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor) as opened:
            found = os.fstat(descriptor)
            process, host = opened.read(1024).splitlines()[:2]
            if stat.S_ISREG(found.st_mode):
                return int(process), host, found.st_mtime
    return None


def make_parents(out: Path) -> list[Path]:
    """Makes the directories above `out`, and returns the new ones, innermost first. Raises OSError."""
    new = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    return new


def remove_empty(directories: list[Path]) -> None:
    """Removes those of the directories that are empty."""
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.rmdir()
