"""Devices and processes: where arrays live, and what each process does.

`mesh` (the mesh, and the table from logical axis names to mesh axes), `processes` (several hosts), `together` (what
their processes do together), `failure` (how they end together), `offload` (weights in host memory), `fits` (what fits
on a device), `preemption` (SIGTERM). May import errors, storage.
"""
