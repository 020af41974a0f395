"""Distils Qwen-Image into two steps.

    arcflow convert --source Qwen/Qwen-Image --out checkpoints/qwen
    arcflow train --config qwen --config.prompts=prompts.txt

Variants: the default, `qwen:published`, is the paper's, rank 256, 4.7 % of the teacher. `qwen:fast` takes half of the
training steps (see docs/distil.md). `qwen:compact`, rank 64 and batch 4, is for fewer devices. `qwen:legendre` has
Legendre polynomials in place of the momentum mixture. `qwen:single` is for one card of 32 GB, or of 24 GB with int4:
rank 64, one example at a time, on a quantized base. None has been run at this size.

    arcflow convert --source Qwen/Qwen-Image --out checkpoints/qwen-int8 --quantize int8
    arcflow embed-prompts --config qwen:single --config.prompts=prompts.txt --out embeddings/qwen
    arcflow train --config qwen:single --config.prompts=prompts.txt
"""

from ml_collections import ConfigDict


def get_config(arg: str = "published") -> ConfigDict:
    sizes = {"published": (256, 16), "fast": (256, 16), "compact": (64, 4), "legendre": (256, 16), "single": (64, 16)}
    if arg not in sizes:
        raise ValueError(f"known variants are {', '.join(sizes)}")
    rank, batch = sizes[arg]
    preview = ("a red fox in fresh snow, early morning light", 'a shop window with the word "OPEN" in neon letters')
    config = ConfigDict({"model": "checkpoints/qwen", "out": f"runs/qwen-{arg}", "guidance": 4.0, "batch": batch})
    config.update(prompts="prompts.txt", steps=15_000, keep_every=2500, preview_every=500, preview_prompts=preview)
    config.adapter = {"rank": rank}
    config.distillation = {"decay": 1000, "teacher_guidance": "cfg"}  # Qwen-Image has no guidance embedding
    config.optimizer = {"groups": (("head.proj_out_loggamma.*", 0.1),)}  # log-momenta learn slowly
    if arg == "fast":
        config.steps = 7500
        config.distillation.update(decay=500, least_share=0.4, cuts="stratified")
    if arg == "single":
        config.update(model="checkpoints/qwen-int8", embeddings="embeddings/qwen", preview_every=0)
        config.update(accumulate=16, remat="full", offload_optimizer=True)
    if arg == "legendre":
        config.adapter.update(basis="legendre", modes=4)
        config.distillation.mode_dropout = 0.0
        config.optimizer.groups = ()
    return config
