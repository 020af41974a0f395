"""Where arrays live and which process does what.

`mesh` (one mesh, and the table from logical axis names to its axes), `processes` (several hosts), `offload` (weights
that wait in host memory), `preemption` (SIGTERM). May import errors.
"""
