"""Devices and processes: where arrays live, and what each process does.

`mesh` (the mesh, and the table from logical axis names to mesh axes), `processes` (several hosts), `together` (what
their processes do together), `failure` (how they end together), `offload` (weights in host memory), `chips` (known
accelerators), `fits` (what fits on a device), `xla_presets` (flags of XLA), `preemption` (SIGTERM). May import errors,
schema, storage.
"""
