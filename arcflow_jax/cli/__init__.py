"""The command line, `arcflow`: one file for each group of commands; `app` joins them. May import every other room.

A command parses its options, imports the function that does the work, calls it and prints. The import stands in the
command, so that `--help` does not wait for JAX.
"""
