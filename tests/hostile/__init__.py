"""Damaged and hostile inputs, in any number: `python -m tests.hostile --count 10000`.

`case` runs one input and says how it ended. `mutate` damages JSON, bytes and names. `good` makes the inputs that are
damaged, once per process. `runner` runs many cases and prints a table. Every other module makes the cases of one family
of inputs: a function of a random generator and an empty folder, which returns a `Case`; `families` lists them.

A seed and a family name one case, so that it can be run alone: `--family NAME --seed SEED --count 1`.
"""
