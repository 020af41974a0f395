"""What is compared: variants of configs/tiny_ablation.py, by section of the table."""

from __future__ import annotations

METHODS = ("linear", "arcflow", "legendre")
NFES = (1, 2, 4)
MODES = {"arcflow": (2, 4, 8, 16), "legendre": (2, 3, 4, 6)}  # modes of the mixture; terms of the series
RATES = ("half-rate", "double-rate")
PARTS = ("zero-momenta", "slow-momenta", "no-mixing", "no-mode-dropout", "slow-head", "fast-head")
SETTINGS = ("shift-1", "shift-3.2", "guided")


def cell(method: str, *changes: str) -> str:
    """The variant's name; an empty change is left out."""
    return "+".join([method, *filter(None, changes)])


def nfe(count: int) -> str:
    """The change to this NFE."""
    return "" if count == 2 else f"nfe-{count}"


def modes(method: str, count: int) -> str:
    """The change to this number of modes or terms."""
    return "" if count == {"arcflow": 16, "legendre": 4}[method] else f"k-{count}"


SECTIONS = {
    "linear, momentum (K = 16), Legendre (4 terms)": [cell(m, nfe(n)) for n in NFES for m in METHODS],
    "modes K of the mixture": [cell("arcflow", modes("arcflow", k)) for k in MODES["arcflow"]],
    "terms of the Legendre series": [
        cell("legendre", modes("legendre", k), nfe(n)) for n in NFES[:2] for k in MODES["legendre"]
    ],
    "learning rate": [cell(m, rate) for rate in RATES for m in METHODS],
    "parts of the recipe": [cell("arcflow", part) for part in PARTS],
    "timestep shift and guidance": [cell(m, setting) for setting in SETTINGS for m in METHODS],
}
# Each once; first those that support the claim
CELLS = list(dict.fromkeys(name for names in SECTIONS.values() for name in names))
COMPARED = {cell(m, nfe(n)) for n in (1, 2) for m in METHODS}
SEEDS = 3  # of each compared cell


def seeds(name: str, count: int | None) -> range:
    """The seeds of a cell: `count` of them if it is given."""
    return range(count if count is not None else SEEDS if name in COMPARED else 1)
