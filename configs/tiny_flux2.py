"""Distils the bundled FLUX.2 [klein] on a laptop: the recipe and the variants of tiny.py, with CFG for the teacher.

arcflow train --config tiny_flux2
"""

from arcflow_jax.configs import tiny
from ml_collections import ConfigDict

from arcflow_jax.demo import ASSETS


def get_config(arg: str = "arcflow") -> ConfigDict:
    config = tiny.get_config(arg)
    config.update(model=str(ASSETS / "tiny-flux2"), out=f"runs/tiny-flux2-{arg}", guidance=1.5)
    config.distillation.teacher_guidance = "cfg"  # FLUX.2 [klein] has no guidance embedding
    return config
