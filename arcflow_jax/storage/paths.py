"""Paths that a user names: a local path or one in a bucket, and what both can do."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from arcflow_jax.errors import UserError, one_line

if TYPE_CHECKING:
    from arcflow_jax.storage.bucket import BucketPath, Growing

SCHEMES = ("gs://", "s3://")
UNFINISHED = ".incomplete"  # in a directory that a writer has not completed yet, or has not cleaned up


def as_path(source: str | os.PathLike[str]) -> Path:
    """A path that a user named and that may not exist.

    In a bucket it is a `bucket.BucketPath`, which has those methods of `pathlib.Path` that the library uses.

    Raises:
      UserError: if it cannot exist: its name is too long, or names no bucket, …
    """
    text = os.fspath(source)
    if not text:  # as of a variable that is not set; Path takes it for the working directory
        raise UserError("a path is empty: name a file or a folder, or . for the working directory")
    if text.startswith(SCHEMES):
        from arcflow_jax.storage.bucket import BucketPath  # not at the top: it takes 0.2 s, and few need it

        path = BucketPath(text)
        if len(path.parts) < 3:
            raise UserError(f"{one_line(text)} names no bucket: {text.partition('/')[0]}//BUCKET/PATH would")
        return cast(Path, path)
    scheme, separator, _ = text.partition("://")
    if separator and scheme.isalnum():
        raise UserError(
            f"{one_line(text)}: paths are local, gs://BUCKET/PATH or s3://BUCKET/PATH, not {one_line(scheme)}://"
        )
    path = Path(text)
    try:
        path.exists()
        text.encode()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {one_line(source)}: {getattr(error, 'strerror', None) or error}") from None
    return path


def in_bucket(path: Any) -> TypeGuard[BucketPath]:
    """Whether a path leads to a bucket."""
    return str(path).startswith(SCHEMES)


def growing(path: BucketPath) -> Growing:
    """A file in a bucket to append to."""
    from arcflow_jax.storage.bucket import Growing

    return Growing(path)


def remove_tree(path: Path) -> None:
    """Removes a directory and all below, as far as possible; a link is not followed."""
    if in_bucket(path):
        path.rmtree()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sizes_below(folder: Path) -> dict[str, int]:
    """The bytes of each file below a folder, by its path in the folder, sorted."""
    if in_bucket(folder):
        found = folder.sizes()
    else:
        found = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    names = {path.relative_to(folder).as_posix(): size for path, size in sorted(found.items())}
    return {name: size for name, size in names.items() if name != UNFINISHED}


def file_test(folder: Path) -> Callable[[Path], bool]:
    """Whether a path below a folder is a file, for many paths: a bucket is asked for its names once."""
    if not in_bucket(folder):
        return Path.is_file
    there = set(folder.sizes())
    return lambda path: path in there


@contextlib.contextmanager
def local_copy(folder: Path) -> Iterator[Path]:
    """A folder of a few small files on this machine, for a library that knows no buckets."""
    if not in_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as local:
        for path in folder.iterdir():
            (Path(local) / path.name).write_bytes(path.read_bytes())
        yield Path(local)


@contextlib.contextmanager
def written_locally(folder: Path) -> Iterator[Path]:
    """A folder on this machine for a library that knows no buckets: what it writes goes to `folder` at the end."""
    if not in_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as local:
        yield Path(local)
        for path in Path(local).rglob("*"):
            if path.is_file():
                (folder / path.relative_to(local)).upload(path)
