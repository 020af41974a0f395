"""What all tests share: a compilation cache, because many compile the same programs, and the converted teachers."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

import pytest

# Read by JAX when it is first imported, here and in the processes that tests start
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")
# Most of the suite's time is compiling. Unoptimized programs compile faster, and give the same to rounding
FAST_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_disable_hlo_passes=tree_reduction_rewriter"
if version("jaxlib") < "0.11":  # later ones have no such choice, and XLA ends the process at an unknown flag
    FAST_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FAST_TO_COMPILE)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the real hub; read when the hub's library is imported


def pytest_collection_finish() -> None:
    """What all imports have made stays to the end: Python need not search it for garbage, nor the rest so often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory) -> Path:
    """The bundled FLUX.1 teacher as a model directory. All tests and workers share it: do not write to it."""
    return converted("tiny-flux", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_emoji(tmp_path_factory) -> Path:
    """The bundled emoji teacher as a model directory. All tests and workers share it: do not write to it."""
    return converted("tiny-emoji", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_flux2(tmp_path_factory) -> Path:
    """The bundled FLUX.2 [klein] teacher as a model directory. All tests and workers share it: do not write to it."""
    return converted("tiny-flux2", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory) -> Path:
    """The bundled Qwen-Image teacher as a model directory. All tests and workers share it: do not write to it."""
    return converted("tiny-qwen", tmp_path_factory)


def converted(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundled teacher, converted by the first worker that asks for it."""
    from filelock import FileLock

    from arcflow_jax.demo import ASSETS
    from arcflow_jax.models.conversion import convert_model

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of this run, shared by its workers
    model = base / "models" / teacher
    model.parent.mkdir(exist_ok=True)
    with FileLock(f"{model}.lock"):
        if not model.exists():
            convert_model(ASSETS / teacher, model)
    return model
