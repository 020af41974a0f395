"""A disk on which files cannot grow beyond a size: writing fails as on a full one, for TensorStore's C++ as well."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def disk_for_files_up_to(size: int) -> Iterator[None]:
    """While it lasts, writing more than `size` bytes into a file of this process is an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
