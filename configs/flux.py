"""Distils FLUX.1-dev into two steps.

    arcflow convert --source black-forest-labs/FLUX.1-dev --out checkpoints/flux
    arcflow train --config flux --config.prompts=prompts.txt

Variants: the default trains rank 224, 4.8 % of the teacher. `flux:published` is the paper's, rank 256, 5.5 %.
`flux:fast` takes half of the training steps (see docs/distil.md). `flux:legendre` has Legendre polynomials in place of
the momentum mixture. `flux:single` is for one card of 24 GB, or of 16 GB with int4: rank 64, one example at a time, on
a quantized base. None has been run at this size.

    arcflow convert --source black-forest-labs/FLUX.1-dev --out checkpoints/flux-int8 --quantize int8
    arcflow embed-prompts --config flux:single --config.prompts=prompts.txt --out embeddings/flux
    arcflow train --config flux:single --config.prompts=prompts.txt
"""

from ml_collections import ConfigDict


def get_config(arg: str = "default") -> ConfigDict:
    ranks = {"default": 224, "published": 256, "fast": 224, "legendre": 224, "single": 64}
    if arg not in ranks:
        raise ValueError(f"known variants are {', '.join(ranks)}")
    preview = ("a red fox in the snow", "a street market at night, in the rain", "a wooden sign that says OPEN")
    config = ConfigDict({"model": "checkpoints/flux", "out": f"runs/flux-{arg}", "guidance": 3.5})
    config.update(prompts="prompts.txt", steps=10_000, keep_every=2000, preview_every=500, preview_prompts=preview)
    config.adapter = {"rank": ranks[arg]}
    config.distillation = {"decay": 2000}
    config.optimizer = {"groups": (("head.proj_out_loggamma.*", 0.1),)}  # log-momenta learn slowly
    if arg == "fast":
        config.steps, config.distillation = 5000, {"decay": 1000, "least_share": 0.4, "cuts": "stratified"}
    if arg == "single":
        config.update(model="checkpoints/flux-int8", embeddings="embeddings/flux", preview_every=0)
        config.update(accumulate=16, remat="full", offload_optimizer=True)
    if arg == "legendre":
        config.adapter.update(basis="legendre", modes=4)
        config.distillation.mode_dropout = 0.0
        config.optimizer.groups = ()
    return config
