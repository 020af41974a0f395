"""`python -m arcflow_jax` is `arcflow`, where the environment's scripts are not on the path."""

from arcflow_jax.cli.app import main

main()
