"""The demo: the whole job, from PyTorch weights to a comparison of samplers, on a teacher small enough to bundle.

captions.py    attributes and captions of a world
shapes.py      the world of shapes: captions and images
emoji.py       the world of emoji: captions, and images for whoever has the font
judge.py       a small classifier of a world's images
world.py       what measures a world's images
evaluate.py    runs and measures samplers
trajectory.py  the states between noise and data
report.py      the HTML page
run.py         convert, distil, sample, measure, report

May import every room but cli.
"""

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SIDE = 64  # pixels along a side of every world's images
