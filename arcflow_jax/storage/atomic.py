"""Files and directories that appear complete or not at all, and the checks before they are written.

In a bucket an object appears when its upload ends. A directory is written in place there, and is complete once it has
its description, which is written last; until then it has an object `.incomplete`.

On a disk, what is being written has a name of its own, `.NAME.<16 random digits>.tmp` or `.incomplete`, so two writers
never share one, and no link can wait there. What a killed run has left under such a name is removed by the next writer
of the same path, if it is the only one (see `lock`).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from arcflow_jax.errors import UserError, of_files
from arcflow_jax.storage.lock import check_place, hidden, is_writer, one_writer, unfinished_name
from arcflow_jax.storage.paths import UNFINISHED, growing, in_bucket, remove_tree

if TYPE_CHECKING:
    from arcflow_jax.storage.bucket import BucketPath


@contextlib.contextmanager
def cannot_write(what: object) -> Iterator[None]:
    """Inside the `with` block, an OSError becomes a UserError that names what could not be written."""
    try:
        yield
    except OSError as error:
        raise of_files(f"cannot write {what}", error) from error


def write_file(path: Path, data: bytes, *, new: bool = False) -> None:
    """Writes a file, which appears complete or not at all. A link at `path` is replaced, not followed.

    Args:
      new: refuses to replace a file, even one that another process writes at the same time.

    Raises:
      FileExistsError: if `new`, and there is a file.
      OSError: as it is; `cannot_write` around it makes a UserError of it.
    """
    if in_bucket(path):
        return path.write_bytes(data, new=new)
    clear_leftovers(path)
    aside = hidden(path, f"{secrets.token_hex(8)}.tmp")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        if new and linked(aside, path):
            return
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def linked(file: Path, path: Path) -> bool:
    """Gives a file a second name by a hard link, which never replaces a file. False if the disk has no hard links.

    Raises:
      FileExistsError: if the second name is used.
    """
    try:
        os.link(file, path)
    except FileExistsError:
        raise
    except OSError as error:
        if path.exists():
            raise FileExistsError(path) from error
        return False
    return True


@contextlib.contextmanager
def whole_directory(out: Path, needed: int) -> Iterator[Path]:
    """Yields a new directory beside `out` to write to. It becomes `out` at the end, or is removed after an error.

    In a bucket it yields `out` itself. There the file that makes the directory complete has to be written last.

    Raises:
      UserError: if the disk has no room for `needed` bytes, or on any OSError.
    """
    if in_bucket(out):
        with cannot_write(out), in_place(out):
            yield out
        return
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
            raise type(error)(str(error).replace(str(aside), str(out))) from error
        finally:
            remove_tree(aside)


@contextlib.contextmanager
def in_place(out: BucketPath) -> Iterator[None]:
    """Around the writing of a directory in a bucket: after an error nothing of it is left."""
    out.rmtree()  # of a killed writer: `refuse_used` has found nothing else
    (out / UNFINISHED).write_bytes(b"")
    try:
        yield
    except BaseException:
        out.rmtree()
        raise
    (out / UNFINISHED).unlink()


@contextlib.contextmanager
def new_output(out: Path, description: str) -> Iterator[None]:
    """`one_writer` of a directory that must not have content yet. Raises UserError as it and `refuse_used` do.

    Args:
      description: the file in it that is written last, see `whole_directory`.
    """
    refuse_used(out, description)
    with one_writer(out):
        refuse_used(out, description)  # another writer may have ended just now
        yield


def clear_leftovers(path: Path) -> None:
    """Removes what killed writers of `path` have left beside it, if this process is now its only writer."""
    if in_bucket(path) or not is_writer(path):
        return
    ours = re.compile(re.escape(hidden(path, "").name) + r"[0-9a-f]{16}\.(tmp|incomplete)")
    with os.scandir(path.parent) as entries:
        found = [entry for entry in entries if ours.fullmatch(entry.name)]
    for entry in found:  # a link of such a name is none of ours
        if entry.is_dir(follow_symlinks=False):
            remove_tree(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            Path(entry.path).unlink(missing_ok=True)


def append(path: Path) -> TextIO:
    """Opens a text file to append to. Raises OSError, also if it is a link.

    In a bucket it is a `bucket.Growing`.
    """
    if in_bucket(path):
        return io.TextIOWrapper(growing(path), "utf-8", write_through=True)

    def no_link(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    return open(path, "a", opener=no_link)


def upload(file: TextIO) -> None:
    """Uploads a file that `append` has opened, if it is in a bucket. Raises OSError."""
    if isinstance(file, io.TextIOWrapper) and hasattr(file.buffer, "upload"):
        file.buffer.upload()


def unfinished(out: Path) -> Path:
    """The directory beside `out` in which its one writer collects what the next one resumes from.

    It has a file `UNFINISHED`, which says what is collected, until `finish`. In a bucket it is `out` itself.

    Raises:
      UserError: if it is not a directory, or has a link in it: none of ours has.
    """
    if in_bucket(out):
        return out
    aside = unfinished_name(out)
    for path in (aside, *(aside.iterdir() if aside.is_dir() and not aside.is_symlink() else ())):
        if path.is_symlink():
            raise UserError(f"{path} is a link, which an unfinished {out.name} does not have: remove it")
    return aside


def finish(out: Path) -> None:
    """Gives what `unfinished` holds its name, `out`; that may be an empty directory. Raises OSError."""
    aside = unfinished(out)
    (aside / UNFINISHED).unlink(missing_ok=True)
    if aside != out:
        if out.exists():
            out.rmdir()
        os.replace(aside, out)


def check_room(out: Path, needed: int) -> None:
    """Raises UserError if the disk that `out` will be on has no room for `needed` bytes."""
    if in_bucket(out):
        return
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(f"cannot write {out}: it needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free")


def refuse_used(out: Path, description: str) -> None:
    """Raises UserError unless `out` is an empty directory, or does not exist and can be made.

    In a bucket it may hold what a killed writer has left: the description is missing.
    """
    check_place(out)
    if in_bucket(out):
        with cannot_write(out):
            if not (out / description).exists() and ((out / UNFINISHED).exists() or not out.exists()):
                return
        raise UserError(f"{out} exists already: name a directory that does not exist, or remove it first")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already: name a directory that does not exist, or remove it first")


def make_directory(path: Path) -> None:
    """Makes a directory and its parents where they do not exist. Raises UserError on any OSError."""
    with cannot_write(path):
        path.mkdir(parents=True, exist_ok=True)
