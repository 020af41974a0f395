"""Compiles programs for accelerators that are not attached, and reports memory, work and communication.

topology.py      topologies by name, and the compilers for them
programs.py      the programs, with abstract, sharded arguments
collectives.py   communication, read from the compiled HLO
child.py         compiles one case in its own process
report.py        runs the cases and prints the table

May import every room but demo and cli.
"""
