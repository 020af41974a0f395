"""What is compared: variants of configs/tiny_ablation.py, by the section of the table that they stand in."""

from __future__ import annotations

METHODS = ("linear", "arcflow", "legendre")
CALLS = (1, 2, 4)
MODES = {"arcflow": (2, 4, 8, 16), "legendre": (2, 3, 4, 6)}  # of the mixture; terms of the series
RATES = ("half-rate", "double-rate")
PARTS = ("zero-momenta", "slow-momenta", "no-mixing", "no-mode-dropout", "slow-head", "fast-head")
SETTINGS = ("shift-1", "shift-3.2", "guided")


def cell(method: str, *changes: str) -> str:
    """The variant's name; a change that is "" is none."""
    return "+".join([method, *filter(None, changes)])


def calls(count: int) -> str:
    """The change to so many network calls."""
    return "" if count == 2 else f"nfe-{count}"


def modes(method: str, count: int) -> str:
    """The change to so many modes or terms."""
    return "" if count == {"arcflow": 16, "legendre": 4}[method] else f"k-{count}"


SECTIONS = {
    "linear, momentum (K = 16), Legendre (4 terms)": [cell(m, calls(n)) for n in CALLS for m in METHODS],
    "modes K of the mixture": [cell("arcflow", modes("arcflow", k)) for k in MODES["arcflow"]],
    "terms of the Legendre series": [
        cell("legendre", modes("legendre", k), calls(n)) for n in CALLS[:2] for k in MODES["legendre"]
    ],
    "learning rate": [cell(m, rate) for rate in RATES for m in METHODS],
    "parts of the recipe": [cell("arcflow", part) for part in PARTS],
    "time shift and guidance": [cell(m, setting) for setting in SETTINGS for m in METHODS],
}
# Each once, those first that the claim stands on
CELLS = list(dict.fromkeys(name for names in SECTIONS.values() for name in names))
COMPARED = {cell(m, calls(n)) for n in (1, 2) for m in METHODS}
SEEDS = 3  # of the compared


def seeds(name: str, count: int | None) -> range:
    """The seeds of a cell, if `count` does not say how many."""
    return range(count if count is not None else SEEDS if name in COMPARED else 1)
