"""Distillation runs: from a recipe to a trained student.

`recipe` has the settings and `overrides` reads them; `plan` has shapes and the compiled step; `start` the first state;
`loop` runs. `state` has one training step, `optimizer` its optimizer. `log`, `preview` and `trace` report. `dry_run`
says what a run would do. `embeddings` writes and reads a cache. May import generate, checkpoints and what lies below.
"""
