"""Paths in a bucket, gs://BUCKET/… and s3://BUCKET/….

An object in a bucket appears as a whole when its upload ends, and cannot be renamed or appended to. Folders do not
exist: a path is a directory if the name of an object begins with it.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import io
import stat
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import fsspec
import fsspec.config
from etils.epath.gpath import PosixGPath

from arcflow_jax.errors import UserError, cause_of, one_line

SCHEMES = {"gs": "gcs", "s3": "s3"}  # scheme → extra of setup.py that installs its client
# What an account needs, for errors: to read, and to write
PERMISSIONS = {
    "gs": ("storage.objects.get and storage.objects.list", "storage.objects.create and storage.objects.delete"),
    "s3": ("s3:GetObject and s3:ListBucket", "s3:PutObject and s3:DeleteObject"),
}
LOGIN = {"gs": "gcloud auth application-default login", "s3": "aws configure, or AWS_ACCESS_KEY_ID"}
LARGE = 8 * 2**20  # bytes from which a local file is uploaded in chunks; gcsfs does so from 5 MiB on
CHUNK = 50 * 2**20  # bytes of a chunk, as gcsfs has it
UPLOAD_SECONDS = 30.0  # between two uploads of a growing file
UPLOAD_PAUSE = 20  # and this many times what an upload took, as it stops the writer: with many previews, for seconds
for _scheme in ("gs", "gcs", "s3"):  # other processes write there too; this is for Orbax's own paths as well
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)


# For the type checker it is a `pathlib.Path`, too
Base: Any = Any if TYPE_CHECKING else PosixGPath


class BucketPath(Base):
    """A path in a bucket, with those methods of `pathlib.Path` that the library uses.

    An error is an OSError that says in one line what was denied, is missing, or does not answer.
    """

    @property
    def scheme(self) -> str:
        """gs or s3."""
        return self.parts[1]

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self.parts[2]

    @property
    def store(self) -> fsspec.AbstractFileSystem:
        """Its client. Raises UserError if that is not installed."""
        try:
            return fsspec.filesystem(self.scheme)
        except ImportError as error:
            extra = SCHEMES[self.scheme]
            raise UserError(f"{self}: pip install 'arcflow_jax[{extra}]' first ({one_line(error)})") from None

    def info(self) -> dict[str, Any] | None:
        """What the store says about an object or folder; None if there is none."""
        with self.clear_errors(), contextlib.suppress(FileNotFoundError):
            return self.store.info(str(self))
        return None

    def exists(self) -> bool:
        return self.info() is not None

    def is_file(self) -> bool:
        return (self.info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self.info() or {}).get("type") == "directory"

    def is_symlink(self) -> bool:
        return False

    def resolve(self, strict: bool = False) -> BucketPath:
        return self

    absolute = expanduser = resolve

    def stat(self) -> Any:
        """Size, mode and time of the last change, with pathlib's names. Raises FileNotFoundError."""
        if (info := self.info()) is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        changed = info.get("mtime") or info.get("LastModified")
        mode = stat.S_IFREG if info["type"] == "file" else stat.S_IFDIR
        seconds = changed.timestamp() if changed is not None else 0
        return types.SimpleNamespace(
            st_size=info["size"], st_mode=mode, st_mtime=seconds, st_mtime_ns=int(seconds * 1e9)
        )

    def iterdir(self) -> Iterator[BucketPath]:
        with self.clear_errors():
            names = self.store.ls(str(self), detail=False)
        for name in names:
            if (path := self / name.rstrip("/").rpartition("/")[2]) != self:  # not a folder's own empty object
                yield path

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """What is directly below and has a name that fits."""
        if self.is_dir():
            yield from (path for path in self.iterdir() if fnmatch.fnmatch(path.name, pattern))

    def rglob(self, pattern: str) -> Iterator[BucketPath]:
        """All objects below whose names fit."""
        yield from (path for path in self.sizes() if fnmatch.fnmatch(path.name, pattern))

    def sizes(self) -> dict[BucketPath, int]:
        """All objects below, and their bytes, with few requests."""
        with self.clear_errors():
            found = self.store.find(str(self), detail=True)
        return {BucketPath(f"{self.scheme}://{name}"): info["size"] for name, info in found.items() if name[-1] != "/"}

    def open(self, mode: str = "r", **options: Any) -> IO[Any]:
        """Opens an object to be read."""
        assert mode in ("r", "rb"), "an object is written as a whole"
        with self.clear_errors():
            file = self.store.open(str(self), "rb")
        buffered = io.BufferedReader(file, 2**20)
        return buffered if mode == "rb" else io.TextIOWrapper(buffered, options.get("encoding", "utf-8"))

    def read_bytes(self, start: int | None = None, end: int | None = None) -> bytes:
        """The object, or some bytes of it."""
        with self.clear_errors():
            return self.store.cat_file(str(self), start=start, end=end)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes, *, new: bool = False) -> None:
        """Writes the object, or replaces it. Raises FileExistsError if it is to be new, and is not."""
        # gcsfs writes a line feed after the data of a small upload. After a carriage return the two may be read as one
        # line break, and the byte is lost. An upload of at least `chunksize` bytes is sent without any line feed.
        chunks = {"chunksize": min(len(data), CHUNK)} if self.scheme == "gs" and data.endswith(b"\r") else {}
        try:
            with self.clear_errors(write=True):
                self.store.pipe_file(str(self), data, mode="create" if new else "overwrite", **chunks)
        except FileNotFoundError as error:
            raise OSError(errno.ENOENT, f"there is no bucket {self.bucket}") from error

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object. S3 does not say whether there was one."""
        with self.clear_errors(write=True), contextlib.suppress(*([FileNotFoundError] if missing_ok else [])):
            self.store.rm_file(str(self))

    def rmtree(self, missing_ok: bool = True) -> None:
        """Removes all objects below."""
        with self.clear_errors(write=True), contextlib.suppress(*([FileNotFoundError] if missing_ok else [])):
            self.store.rm(str(self), recursive=True)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: folders do not exist."""

    def rmdir(self) -> None:
        """Does nothing: folders do not exist."""

    def copy_to(self, to: BucketPath) -> None:
        """Copies the object inside the store: nothing of it comes here."""
        with self.clear_errors(write=True):
            self.store.cp_file(str(self), str(to))

    def upload(self, file: Path) -> None:
        """Writes the object from a local file, a large one in chunks."""
        if file.stat().st_size < LARGE:
            self.write_bytes(file.read_bytes())
            return
        with self.clear_errors(write=True):
            self.store.put_file(str(file), str(self))

    @contextlib.contextmanager
    def clear_errors(self, write: bool = False) -> Iterator[None]:
        """Inside the `with` block, any error of a client becomes an OSError that says what would be right."""
        try:
            yield
        except (FileExistsError, UserError):
            raise
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self)) from None
        except Exception as error:
            raise self.clear_error(error, write) from error

    def clear_error(self, error: Exception, write: bool = False) -> OSError:
        """An error of a client as PermissionError or ConnectionError, with a text that says what would be right."""
        text, name = one_line(error), type(error).__name__
        if cause_of(error) == "permission" or getattr(error, "code", None) in (401, 403):
            needed = PERMISSIONS[self.scheme][write]
            doing = "write to" if write else "read"
            return PermissionError(
                errno.EACCES, f"this account may not {doing} bucket {self.bucket}: it needs {needed} ({text})"
            )
        if "Credentials" in name or "RefreshError" in name:
            return PermissionError(
                errno.EACCES, f"no credentials for bucket {self.bucket}: {LOGIN[self.scheme]} ({text})"
            )
        return ConnectionError(errno.EIO, f"bucket {self.bucket} does not answer, try again ({name}: {text})")


class Growing(io.BytesIO):
    """A file that is appended to, which an object cannot be. It is in memory and is uploaded as a whole.

    That happens at most every `UPLOAD_SECONDS` when it is flushed, less often if it takes long, and when it is closed.
    """

    def __init__(self, path: BucketPath):
        super().__init__()
        self.path, self.uploaded, self.next_upload = path, 0, 0.0
        if path.exists():
            self.uploaded = self.write(path.read_bytes())

    def flush(self) -> None:
        if not self.closed and time.monotonic() >= self.next_upload:
            self.upload()

    def upload(self) -> None:
        """Uploads what is new. Raises OSError."""
        if self.tell() > self.uploaded:
            began = time.monotonic()
            self.path.write_bytes(self.getvalue())
            ended = time.monotonic()
            self.uploaded, self.next_upload = self.tell(), ended + max(UPLOAD_SECONDS, UPLOAD_PAUSE * (ended - began))

    def close(self) -> None:
        if not self.closed:
            self.upload()
        super().close()
