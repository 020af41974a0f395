"""The persistent compilation cache, in processes of their own: JAX reads its settings once."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
from arcflow_jax.storage import cache
cache.enable_compilation_cache()
import jax
jax.jit(lambda x: x * 2 + 1)(jax.numpy.arange(7)).block_until_ready()
print(jax.config.jax_compilation_cache_dir)
"""


def cache_of(**environment: str) -> str:
    """The cache that a process with these environment variables uses."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    settings = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=inherited | settings | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_programs_are_kept_in_the_librarys_cache(tmp_path):
    assert cache_of(ARCFLOW_CACHE=str(tmp_path)) == str(tmp_path / "xla")
    assert any((tmp_path / "xla").iterdir())


def test_the_users_choice_is_left_alone(tmp_path):
    mine, ours = tmp_path / "mine", tmp_path / "ours"
    assert cache_of(ARCFLOW_CACHE=str(ours), JAX_COMPILATION_CACHE_DIR=str(mine)) == str(mine)
    cache_of(ARCFLOW_CACHE=str(ours), JAX_ENABLE_COMPILATION_CACHE="0")
    assert not ours.exists()
