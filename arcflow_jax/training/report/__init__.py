"""What a run tells: what it would do, and what it has done.

`dry_run` is before the first step; `log` writes console, log.jsonl and TensorBoard, `wandb` Weights & Biases; `preview`
makes images, `trace` a profile. May import training's recipe, plan, state and work; the loop imports it.
"""
