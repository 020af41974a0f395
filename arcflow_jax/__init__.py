"""arcflow_jax: ArcFlow (arXiv 2602.09014) in JAX and Flax NNX.

The public names below are imported on first use, so that `import arcflow_jax` needs no JAX and takes no time.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arcflow_jax.checkpoints.diffusers_folder import export_diffusers
    from arcflow_jax.checkpoints.student_formats import export_adapter
    from arcflow_jax.errors import UserError
    from arcflow_jax.flow.curve import Curve
    from arcflow_jax.flow.distill import distil
    from arcflow_jax.flow.legendre import Series
    from arcflow_jax.flow.momentum import Mixture
    from arcflow_jax.flow.sampler import euler, sample
    from arcflow_jax.models.conversion import convert_model
    from arcflow_jax.parallel.mesh import make_mesh
    from arcflow_jax.pipeline import ArcFlowPipeline
    from arcflow_jax.training.loop import train
    from arcflow_jax.training.recipe import Recipe
    from arcflow_jax.training.state import train_step

__version__: str
__all__ = [
    "ArcFlowPipeline",
    "Curve",
    "Mixture",
    "Recipe",
    "Series",
    "UserError",
    "__version__",
    "convert_model",
    "distil",
    "euler",
    "export_adapter",
    "export_diffusers",
    "make_mesh",
    "sample",
    "train",
    "train_step",
]
MODULES = {
    "ArcFlowPipeline": "pipeline",
    "Curve": "flow.curve",
    "Mixture": "flow.momentum",
    "Recipe": "training.recipe",
    "Series": "flow.legendre",
    "UserError": "errors",
    "convert_model": "models.conversion",
    "distil": "flow.distill",
    "euler": "flow.sampler",
    "export_adapter": "checkpoints.student_formats",
    "export_diffusers": "checkpoints.diffusers_folder",
    "make_mesh": "parallel.mesh",
    "sample": "flow.sampler",
    "train": "training.loop",
    "train_step": "training.state",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("arcflow_jax")
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
