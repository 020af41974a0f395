"""The demo: the whole job, from PyTorch weights to a comparison of samplers, on a teacher small enough to bundle."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "assets"
