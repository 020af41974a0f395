"""Files and directories that appear complete or not at all, and the checks before they are written."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from arcflow_jax.errors import UserError


@contextlib.contextmanager
def cannot_write(what: object) -> Iterator[None]:
    """Inside the `with` block, an OSError becomes a UserError that names what could not be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {what}: {error.strerror or error}") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write to. It becomes `path` at the end, or is removed after an error.

    An error passes through as it is; `cannot_write` around it makes a UserError of an OSError.
    """
    aside = path.with_name(f"{path.name}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(out: Path, needed: int) -> Iterator[Path]:
    """Yields a directory beside `out` to write to. It becomes `out` at the end, or is removed after an error.

    Its name depends on `out` only, so that the next run removes what a killed run has left.

    Raises:
      UserError: if the disk has no room for `needed` bytes, or on any OSError.
    """
    aside = incomplete(out)
    with cannot_write(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists():
            shutil.rmtree(aside)
        check_room(out, needed)
        aside.mkdir()
        try:
            yield aside
            os.replace(aside, out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def incomplete(out: Path) -> Path:
    """The directory beside `out` that is written to before it becomes `out`."""
    return out.with_name(f".{out.name}.incomplete")


def check_room(out: Path, needed: int) -> None:
    """Raises UserError if the disk that `out` will be on has no room for `needed` bytes."""
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(f"cannot write {out}: it needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free")


def refuse_used(out: Path) -> None:
    """Raises UserError unless `out` is an empty directory, or does not exist and can be made."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already: name a directory that does not exist, or remove it first")
    if file := next((parent for parent in out.parents if parent.is_file()), None):
        raise UserError(f"cannot write {out}: {file} is not a directory")


def make_directory(path: Path) -> None:
    """Makes a directory and its parents where they do not exist. Raises UserError on any OSError."""
    with cannot_write(path):
        path.mkdir(parents=True, exist_ok=True)
