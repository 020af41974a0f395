"""Distils Qwen-Image into two steps.

    arcflow convert --source PATH/TO/Qwen-Image --out checkpoints/qwen
    arcflow train --config configs/qwen.py --config.prompts=prompts.txt

The paper's recipe: rank 256, 4.7 % of the teacher, 15 000 iterations at batch 16 and 1024 × 1024 pixels.
`configs/qwen.py:compact` is for fewer devices, and not published: rank 64, batch 4. `configs/qwen.py:legendre` is the
paper's with Legendre polynomials in the place of the momentum mixture, not tried at this size either. Several
resolutions in one run as in `configs/flux.py`.

Hardware: weights, adapter, optimizer and batch are split over all devices (`mesh`), whose number has to divide the
batch. `--dry-run` says what each has to hold. Qwen2.5-VL's language model is split like the transformer; where there is
no room for both, `arcflow embed-prompts` runs it beforehand, the negative prompt included.

Cost, estimated and not measured: one pass of the teacher over 4096 + 512 tokens is 78 TFLOP (6.79 billion weights a
token, and attention); a segment takes eleven passes, the student forward, once more, and backward, and the teacher at
four states with the prompt and without; so 2 segments × batch 16 × 15 000 iterations are 4.1e20 FLOP. At half of the
peak that is 500 hours of a v5p (459 TFLOP/s), 125 on four of them, or 232 hours of an H100 (989 TFLOP/s).
"""

from ml_collections import ConfigDict


def get_config(arg: str = "published") -> ConfigDict:
    sizes = {"published": (256, 16), "compact": (64, 4), "legendre": (256, 16)}
    if arg not in sizes:
        raise ValueError(f"configs/qwen.py:{arg}: known are {', '.join(sizes)}")
    rank, batch = sizes[arg]
    momentum = arg != "legendre"
    return ConfigDict(
        {
            "model": "checkpoints/qwen",
            "prompts": "prompts.txt",
            "prompts_field": "prompt",
            "embeddings": "",
            "images": "",
            "out": f"runs/qwen-{arg}",
            "seed": 0,
            "resolutions": ((1024, 1024),),
            "guidance": 4.0,
            "batch": batch,
            "steps": 15_000,
            "dtype": "bfloat16",
            "mesh": (1, -1, 1, 1),
            "log_every": 10,
            "save_every": 500,
            "keep_last": 2,
            "keep_every": 2500,
            "max_skipped": 20,
            "preview_every": 500,
            "preview_prompts": (
                "a red fox in fresh snow, early morning light",
                'a shop window with the word "OPEN" in neon letters',
            ),
            "wandb_project": "",
            "adapter": {
                "basis": "momentum" if momentum else "legendre",
                "modes": 16 if momentum else 4,
                "initial_momenta": (0.2, 4.0),
                "rank": rank,
                "alpha": float(rank),
                "dropout": 0.05,
                "targets": (
                    "transformer_blocks.img_mlp.*",
                    "transformer_blocks.txt_mlp.*",
                    "last_block.*.img_mlp.*",
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
                "decay": 1000,
                "loss_scale": 30.0,
                "state_weight": 0.0,
                "data_weight": 0.0,
                "teacher_guidance": "cfg",  # Qwen-Image has no guidance embedding
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
