"""Distillation runs: from a recipe to a trained student.

`recipe` has the settings and `overrides` reads them; `plan` has shapes and shardings; `start` the first state;
`loop` runs. `state` has one training step, `optimizer` its optimizer, `remat` what its backward pass computes again,
`compile` makes it a program, `work` counts its operations. `embeddings` writes and reads a cache, `latents` encodes
images. `report` is a room of its own. May import generate, checkpoints and what lies below.
"""
