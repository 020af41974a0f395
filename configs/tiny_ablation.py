"""The recipe of tiny.py with named changes, which measure what each of its parts contributes.

    arcflow train --config tiny_ablation:arcflow
    arcflow train --config tiny_ablation:legendre+k-3+nfe-1

The variant is one of tiny.py's and any changes, joined by +. `python -m benchmarks.ablation` trains, evaluates and
compares them.
"""

from arcflow_jax.configs import tiny
from ml_collections import ConfigDict

MOMENTA = "head.proj_out_loggamma.*"
HEAD = "head.proj_out_*"
CHANGES = {
    # Number of network evaluations
    "nfe-1": {"distillation.nfe": 1},
    "nfe-4": {"distillation.nfe": 4},
    # Modes of the mixture, or terms of the series
    **{f"k-{k}": {"adapter.modes": k} for k in (2, 3, 4, 6, 8)},
    # Every mode a constant velocity
    "zero-momenta": {"adapter.initial_momenta": (1.0, 1.0), "optimizer.groups": ((MOMENTA, 0.0),)},
    "slow-momenta": {"optimizer.groups": ((MOMENTA, 0.1),)},
    "slow-head": {"optimizer.groups": ((HEAD, 0.3),)},
    "fast-head": {"optimizer.groups": ((HEAD, 3.0),)},
    "half-rate": {"optimizer.learning_rate": 2e-3},
    "double-rate": {"optimizer.learning_rate": 8e-3},
    # The student alone carries the trajectory, from the first training step
    "no-mixing": {"distillation.decay": 0},
    "no-mode-dropout": {"distillation.mode_dropout": 0.0},
    "shift-1": {"distillation.shift": 1.0},
    "shift-3.2": {"distillation.shift": 3.2},
    "guided": {"guidance": 2.0},
}


def get_config(arg: str = "arcflow") -> ConfigDict:
    student, *changes = arg.split("+")
    if unknown := [change for change in changes if change not in CHANGES]:
        known = ", ".join(CHANGES)
        raise ValueError(f"no change is called {', '.join(unknown)}; known are {known}")
    config = tiny.get_config(student)
    values = [item for change in changes for item in CHANGES[change].items()]
    if len(dict(values)) < len(values):
        raise ValueError("two changes set the same value")
    for key, value in values:
        group, _, name = key.rpartition(".")
        (config[group] if group else config)[name] = value
    config.out = f"runs/tiny-ablation/{arg}"
    return config
