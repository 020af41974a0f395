"""`arcflow serve` as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from arcflow_jax.cli.app import main

main(["serve", *sys.argv[1:]])
