"""Distils the bundled teacher on a laptop.

    arcflow convert --source arcflow_jax/assets/tiny-flux --out checkpoints/tiny-flux
    arcflow train --config configs/tiny.py

Hardware: two CPU cores. Cost: a few minutes. `configs/tiny.py:linear` is the same run for a linear student, one
constant velocity a segment: what the momentum mixture is compared with. `configs/tiny.py:legendre` is one with Legendre
polynomials in the place of the mixture.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "arcflow") -> ConfigDict:
    if arg not in ("arcflow", "linear", "legendre"):
        raise ValueError(f"configs/tiny.py:{arg}: known are arcflow, linear and legendre")
    return ConfigDict(
        {
            "model": "checkpoints/tiny-flux",
            "prompts": "arcflow_jax/assets/prompts-train.txt",
            "prompts_field": "prompt",
            "embeddings": "",
            "images": "",
            "out": f"runs/tiny-{arg}",
            "seed": 0,
            "resolutions": ((64, 64),),
            "guidance": 1.0,
            "batch": 32,
            "steps": 400,
            "dtype": "float32",
            "mesh": (-1, 1, 1, 1),
            "log_every": 10,
            "save_every": 200,
            "keep_last": 2,
            "keep_every": 0,
            "max_skipped": 20,
            "preview_every": 200,
            "preview_prompts": (
                "a large red circle on the left",
                "a small blue square at the top",
                "a green ring on the right",
                "a small yellow triangle in the center on a black background",
            ),
            "wandb_project": "",
            "adapter": {
                "basis": "legendre" if arg == "legendre" else "momentum",
                "modes": {"arcflow": 16, "linear": 1, "legendre": 4}[arg],
                "initial_momenta": (0.2, 4.0),
                "rank": 32,
                "alpha": 32.0,
                "dropout": 0.0,
                "targets": (
                    "single_transformer_blocks.proj_mlp",
                    "single_transformer_blocks.proj_out",
                    "transformer_blocks.ff.*",
                    "transformer_blocks.ff_context.*",
                    "time_text_embed.timestep_embedder.*",
                ),
            },
            "distillation": {
                "nfe": 2,
                "shift": 0.6,  # the bend lies in one long segment, where a straight line fails
                "final_step_ratio": 1.0,
                "states": 4,
                "window": 3,
                "substeps": 128,
                "mode_dropout": 0.1 if arg == "arcflow" else 0.0,
                "decay": 80,
                "loss_scale": 30.0,
                "state_weight": 0.0,
                "data_weight": 0.0,
                "teacher_guidance": "embedded",
                "negative_prompt": "",
            },
            "optimizer": {
                "learning_rate": 4e-3,
                "warmup": 20,
                "decay_steps": 400,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.0,
                "clip_norm": 50.0,
                "clip_from": 20,
                "groups": (),
            },
            "ema": {"start": 20, "power": 8.0},
        }
    )
