"""Compiles programs for accelerators that are not there, and tells what they would take.

chips.py         the accelerators: peak rates and memory
programs.py      the programs, each with abstract arguments in their shardings
work.py          floating-point operations, counted from the jaxpr
collectives.py   communication, read from the compiled HLO
child.py         compiles one case, in a process of its own
report.py        runs the cases, prints the table
"""
