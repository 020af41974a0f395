"""Distils the bundled Qwen-Image on a laptop.

    arcflow convert --source arcflow_jax/assets/tiny-qwen --out checkpoints/tiny-qwen
    arcflow train --config configs/tiny_qwen.py

The recipe of configs/tiny.py, with its variants, but for the layers that are adapted and the teacher's guidance: a
Qwen-Image has no guidance embedding, its guidance is true.

Hardware and cost: those of configs/tiny.py; an iteration takes 1.5 to 1.9 times as long.
"""

from arcflow_jax.configs import tiny
from ml_collections import ConfigDict


def get_config(arg: str = "arcflow") -> ConfigDict:
    config = tiny.get_config(arg)
    config.model, config.out = "checkpoints/tiny-qwen", f"runs/tiny-qwen-{arg}"
    config.guidance = 1.5
    config.adapter.targets = (
        "transformer_blocks.img_mlp.*",
        "transformer_blocks.txt_mlp.*",
        "last_block.*.img_mlp.*",
        "time_text_embed.timestep_embedder.*",
    )
    config.distillation.teacher_guidance = "cfg"
    return config
