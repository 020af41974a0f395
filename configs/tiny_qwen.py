"""Distils the bundled Qwen-Image on a laptop, with CFG for the teacher and the variants of tiny.py.

arcflow train --config tiny_qwen
"""

from arcflow_jax.configs import tiny
from ml_collections import ConfigDict

from arcflow_jax.demo import ASSETS


def get_config(arg: str = "arcflow") -> ConfigDict:
    config = tiny.get_config(arg)
    config.update(model=str(ASSETS / "tiny-qwen"), out=f"runs/tiny-qwen-{arg}", guidance=1.5)
    config.distillation.teacher_guidance = "cfg"  # Qwen-Image has no guidance embedding
    return config
