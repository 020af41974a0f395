"""Distils FLUX.1-dev into two steps.

    arcflow convert --source PATH/TO/FLUX.1-dev --out checkpoints/flux
    arcflow train --config configs/flux.py --config.prompts=prompts.txt

`configs/flux.py` trains rank 224, 4.8 % of the teacher; `configs/flux.py:published` is the paper's recipe, rank 256
and 5.5 %. Both are 10 000 iterations at batch 16 and 1024 × 1024 pixels. `configs/flux.py:legendre` is the first with
Legendre polynomials in the place of the momentum mixture, which on the bundled teacher comes closer (BENCHMARKS.md); at
this size nobody has tried it. Several resolutions in one run, each compiled once:
--config.resolutions="((1024, 1024), (832, 1216), (1216, 832))".

Hardware: weights, adapter, optimizer and batch are split over all devices (`mesh`), whose number has to divide the
batch. `--dry-run` says what each has to hold.

Cost, estimated and not measured: one pass of the teacher over 4096 + 512 tokens is 74 TFLOP (6.45 billion weights a
token, and attention); a segment takes seven passes, the student forward, once more, and backward, and the teacher at
four states; so 2 segments × batch 16 × 10 000 iterations are 1.7e20 FLOP. At half of the peak that is 200 hours of a
v5p (459 TFLOP/s), 50 on four of them, or 94 hours of an H100 (989 TFLOP/s). Pictures, each 500 iterations, add
less than 1 %.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "default") -> ConfigDict:
    ranks = {"default": 224, "published": 256, "legendre": 224}
    if arg not in ranks:
        raise ValueError(f"configs/flux.py:{arg}: known are {', '.join(ranks)}")
    momentum = arg != "legendre"
    return ConfigDict(
        {
            "model": "checkpoints/flux",
            "prompts": "prompts.txt",
            "prompts_field": "prompt",
            "embeddings": "",
            "images": "",
            "out": f"runs/flux-{arg}",
            "seed": 0,
            "resolutions": ((1024, 1024),),
            "guidance": 3.5,
            "batch": 16,
            "steps": 10_000,
            "dtype": "bfloat16",
            "mesh": (1, -1, 1, 1),
            "log_every": 10,
            "save_every": 500,
            "keep_last": 2,
            "keep_every": 2000,
            "max_skipped": 20,
            "preview_every": 500,
            "preview_prompts": (
                "a red fox in the snow",
                "a street market at night in the rain, neon signs",
                "an old fisherman, portrait photograph",
                "a wooden sign that says OPEN",
            ),
            "wandb_project": "",
            "adapter": {
                "basis": "momentum" if momentum else "legendre",
                "modes": 16 if momentum else 4,
                "initial_momenta": (0.2, 4.0),
                "rank": ranks[arg],
                "alpha": float(ranks[arg]),
                "dropout": 0.05,
                "targets": (
                    "single_transformer_blocks.proj_mlp",
                    "single_transformer_blocks.proj_out",
                    "transformer_blocks.ff.*",
                    "transformer_blocks.ff_context.*",
                    "time_text_embed.timestep_embedder.*",
                ),
            },
            "distillation": {
                "nfe": 2,
                "shift": 3.2,
                "final_step_ratio": 1.0,
                "states": 4,
                "window": 3,
                "substeps": 128,
                "mode_dropout": 0.1 if momentum else 0.0,
                "decay": 2000,
                "loss_scale": 30.0,
                "state_weight": 0.0,
                "data_weight": 0.0,
                "teacher_guidance": "embedded",
                "negative_prompt": "",
            },
            "optimizer": {
                "learning_rate": 1e-4,
                "warmup": 100,
                "decay_steps": 0,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.0,
                "clip_norm": 50.0,
                "clip_from": 100,
                "groups": (("head.proj_out_loggamma.*", 0.1),) if momentum else (),
            },
            "ema": {"start": 100, "power": 8.0},
        }
    )
