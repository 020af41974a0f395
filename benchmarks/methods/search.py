"""The search for a method's best setting, as pure functions of what was measured so far.

It begins with several settings: a grid, or a setting that is known to be good and its neighbours, each of which differs
by one step on one axis.

1. All of them get the first quarter of the budget. The best third of them get the rest of it.
2. If they were the grid, all neighbours of the best one get the whole budget, also beyond the grid. If one of them is
   better, its neighbours follow, until none is, or `MOST` settings have had the whole budget.

A run with a part of the budget is the beginning of the run with all of it, so no training is for nothing. A setting may
also stop early: its error is the least one at any of its stops.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.methods.protocol import BATCHES, FIRST, GRID, MOST, RATES, SCHEDULES, Setting

# Endpoint error on the validation prompts, by setting and part of the budget
Errors = Mapping[tuple[Setting, float], float]
AXES = {"rate": RATES, "batch": BATCHES, "schedule": tuple(SCHEDULES)}


def grid() -> list[Setting]:
    """The settings that a search begins with where nothing is known."""
    return [Setting(**dict(zip(GRID, values, strict=True))) for values in itertools.product(*GRID.values())]


def neighbours(setting: Setting) -> list[Setting]:
    """The settings that differ by one step on one axis."""
    found = []
    for name, values in AXES.items():
        at = values.index(getattr(setting, name))
        near = [values[i] for i in (at - 1, at + 1) if 0 <= i < len(values)]
        found += [Setting(**{**vars(setting), name: value}) for value in near]
    return found


def best_third(errors: Errors, settings: Iterable[Setting]) -> list[Setting]:
    """The third of the settings, rounded up, with the least errors after the first part of the budget, best first."""
    ranked = sorted(settings, key=lambda setting: finite(errors[setting, FIRST]))
    return ranked[: math.ceil(len(ranked) / 3)]


def whole(errors: Errors) -> list[Setting]:
    """The settings that have had the whole budget."""
    return [setting for setting, part in errors if part == 1]


def best(errors: Errors) -> tuple[Setting, float]:
    """Setting and part of the budget with the least error, of settings that have had the whole budget."""
    complete = set(whole(errors))
    return min((key for key in errors if key[0] in complete), key=lambda key: finite(errors[key]))


def missing(errors: Errors, start: Sequence[Setting], *, further: bool) -> list[tuple[Setting, float]]:
    """What has to be trained next, each up to which part of the budget; nothing if the search is finished.

    Args:
      errors: all that was measured so far.
      start: the settings to begin with.
      further: whether the neighbours of the best one follow.
    """
    if first := [setting for setting in start if (setting, FIRST) not in errors]:
        return [(setting, FIRST) for setting in first]
    complete = set(whole(errors))
    if rest := [setting for setting in best_third(errors, start) if setting not in complete]:
        return [(setting, 1.0) for setting in rest]
    if not further:
        return []
    near = [setting for setting in neighbours(best(errors)[0]) if setting not in complete]
    return [(setting, 1.0) for setting in near[: max(0, MOST - len(complete))]]


def finite(error: float) -> float:
    """An error for comparisons: what is not a number is worst."""
    return math.inf if math.isnan(error) else error
