"""Shared by all tests: one compilation cache, because many of them compile the same programs."""

import os
import tempfile

# Read by JAX when it is first imported, here and in the processes that tests start
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="arcflow-jax-tests-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
