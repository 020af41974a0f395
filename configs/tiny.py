"""Distils the bundled FLUX.1 of shapes on a laptop, in a few minutes.

    arcflow train --config tiny

Variants: `tiny:linear` has one constant velocity for each segment, `tiny:legendre` Legendre polynomials.
"""

from ml_collections import ConfigDict

from arcflow_jax.demo import ASSETS

STUDENTS = {"arcflow": ("momentum", 16, 0.1), "linear": ("momentum", 1, 0.0), "legendre": ("legendre", 4, 0.0)}


def get_config(arg: str = "arcflow") -> ConfigDict:
    if arg not in STUDENTS:
        raise ValueError(f"known variants are {', '.join(STUDENTS)}")
    basis, modes, mode_dropout = STUDENTS[arg]
    preview = (
        "a large red circle on the left",
        "a small blue square at the top",
        "a green ring on the right",
        "a small yellow triangle in the center on a black background",
    )
    config = ConfigDict({"model": str(ASSETS / "tiny-flux"), "out": f"runs/tiny-{arg}", "guidance": 1.0})
    config.update(prompts=str(ASSETS / "shapes" / "prompts-train.txt"), resolutions=((64, 64),), batch=32, steps=400)
    config.update(dtype="float32", save_every=200, preview_every=200, preview_prompts=preview)
    config.adapter = {"basis": basis, "modes": modes, "rank": 32, "dropout": 0.0}
    # Timestep shift 0.6: the bend lies in one long segment, where a straight line fails
    config.distillation = {"shift": 0.6, "mode_dropout": mode_dropout, "decay": 80}
    config.optimizer = {"learning_rate": 4e-3, "warmup": 20, "decay_steps": 400, "clip_from": 20}
    config.ema = {"start": 20}
    return config
