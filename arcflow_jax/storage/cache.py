"""The folder of what the library caches, and JAX's compilation cache in it: a program is compiled once on a machine."""

from __future__ import annotations

import os
from pathlib import Path

from arcflow_jax.storage.paths import as_path

CACHE = "ARCFLOW_CACHE"  # environment variable: the folder of all that the library caches
MIN_SECONDS = 0.1  # programs that compile faster are not worth a file


def cache_folder() -> Path:
    """The folder of everything that the library caches: ARCFLOW_CACHE, or ~/.cache/arcflow_jax."""
    return as_path(os.environ.get(CACHE) or "~/.cache/arcflow_jax").expanduser()


def enable_compilation_cache() -> None:
    """Turns JAX's persistent compilation cache on, in `cache_folder()`/xla; call it before the first compilation.

    Does nothing where the user has chosen a cache, by JAX_COMPILATION_CACHE_DIR or jax.config. A cache that cannot be
    written is no error: JAX warns and compiles.
    """
    import jax  # not at the top: `arcflow --help` comes past here, and needs no JAX

    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
