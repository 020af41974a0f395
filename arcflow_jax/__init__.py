"""arcflow_jax: ArcFlow (arXiv 2602.09014) in JAX and Flax NNX."""

from typing import Any


def __getattr__(name: str) -> Any:
    # On demand, so that `arcflow --help` and the pure modules do not import every network
    if name == "ArcFlowPipeline":
        from arcflow_jax.pipeline import ArcFlowPipeline

        return ArcFlowPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
