"""Distils the bundled FLUX.1 of emoji on a laptop, with the variants of tiny.py.

arcflow train --config tiny_emoji
"""

from arcflow_jax.configs import tiny
from ml_collections import ConfigDict

from arcflow_jax.demo import ASSETS


def get_config(arg: str = "arcflow") -> ConfigDict:
    config = tiny.get_config(arg)
    config.update(model=str(ASSETS / "tiny-emoji"), out=f"runs/tiny-emoji-{arg}", guidance=2.5, steps=300)
    config.prompts = str(ASSETS / "emoji" / "prompts-train.txt")
    config.preview_prompts = (
        "large pizza on the left",
        "small octopus at the top on a blue background",
        "tiger face",
        "rocket on a black background",
    )
    config.distillation.update(shift=2.0, decay=60, least_share=0.4, cuts="stratified")
    config.optimizer.update(learning_rate=6e-3, decay_steps=300)
    return config
