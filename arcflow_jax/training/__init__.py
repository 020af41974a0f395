"""Distillation runs: from a recipe to a trained student.

`recipe` (settings), `plan` (shapes and the compiled step), `loop` (the run), `state` (one step), `optimizer`; `log`,
`preview` and `trace` show how it goes, `dry_run` what it would be; `embeddings` writes a cache and reads it. May import
generate, checkpoints and what lies below them.
"""
