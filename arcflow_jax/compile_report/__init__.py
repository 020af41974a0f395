"""Compiles programs for accelerators that are not attached, and reports memory, work and communication.

chips.py         the accelerators: peak rates and memory
programs.py      the programs, with abstract, sharded arguments
work.py          floating-point operations, counted in the jaxpr
collectives.py   communication, read from the compiled HLO
child.py         compiles one case in its own process
report.py        runs the cases and prints the table

May import every room but demo and cli.
"""
