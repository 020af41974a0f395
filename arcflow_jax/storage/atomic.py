"""Files and directories that appear complete or not at all, and the checks before they are written.

What is being written has a name of its own, `.NAME.<16 random digits>.tmp` or `.incomplete`, so two writers never share
one, and no link can wait there. What a killed run has left under such a name is removed by the next writer of the same
path, if it is the only one (see `lock`).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from arcflow_jax.errors import UserError
from arcflow_jax.storage.lock import check_place, hidden, is_writer, one_writer, unfinished_name


@contextlib.contextmanager
def cannot_write(what: object) -> Iterator[None]:
    """Inside the `with` block, an OSError becomes a UserError that names what could not be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {what}: {error.strerror or error}") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a new, empty file beside `path` to write to. It becomes `path` at the end, or is removed after an error.

    A link at `path` is replaced, not followed. An error passes through as it is; `cannot_write` around it makes a
    UserError of an OSError.
    """
    clear_leftovers(path)
    aside = hidden(path, f"{secrets.token_hex(8)}.tmp")
    os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(out: Path, needed: int) -> Iterator[Path]:
    """Yields a new directory beside `out` to write to. It becomes `out` at the end, or is removed after an error.

    Raises:
      UserError: if the disk has no room for `needed` bytes, or on any OSError.
    """
    with cannot_write(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(out)
        check_room(out, needed)
        aside = hidden(out, f"{secrets.token_hex(8)}.incomplete")
        aside.mkdir()
        try:
            yield aside
            os.replace(aside, out)
        except UserError as error:  # which may name a file in what is removed now
            raise UserError(str(error).replace(str(aside), str(out))) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def new_output(out: Path) -> Iterator[None]:
    """`one_writer` of a directory that must not have content yet. Raises UserError as it and `refuse_used` do."""
    refuse_used(out)
    with one_writer(out):
        refuse_used(out)  # another writer may have ended just now
        yield


def clear_leftovers(path: Path) -> None:
    """Removes what killed writers of `path` have left beside it, if this process is now its only writer."""
    if not is_writer(path):
        return
    ours = re.compile(re.escape(hidden(path, "").name) + r"[0-9a-f]{16}\.(tmp|incomplete)")
    with os.scandir(path.parent) as entries:
        found = [entry for entry in entries if ours.fullmatch(entry.name)]
    for entry in found:  # a link of such a name is none of ours
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.is_file(follow_symlinks=False):
            Path(entry.path).unlink(missing_ok=True)


def append(path: Path) -> TextIO:
    """Opens a text file to append to. Raises OSError, also if it is a link."""

    def no_link(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    return open(path, "a", opener=no_link)


def unfinished(out: Path) -> Path:
    """The directory beside `out` in which its one writer collects what the next one resumes from.

    Raises:
      UserError: if it is not a directory, or has a link in it: none of ours has.
    """
    aside = unfinished_name(out)
    for path in (aside, *(aside.iterdir() if aside.is_dir() and not aside.is_symlink() else ())):
        if path.is_symlink():
            raise UserError(f"{path} is a link, which an unfinished {out.name} does not have: remove it")
    return aside


def check_room(out: Path, needed: int) -> None:
    """Raises UserError if the disk that `out` will be on has no room for `needed` bytes."""
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(f"cannot write {out}: it needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free")


def refuse_used(out: Path) -> None:
    """Raises UserError unless `out` is an empty directory, or does not exist and can be made."""
    check_place(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already: name a directory that does not exist, or remove it first")


def make_directory(path: Path) -> None:
    """Makes a directory and its parents where they do not exist. Raises UserError on any OSError."""
    with cannot_write(path):
        path.mkdir(parents=True, exist_ok=True)
