"""Distils FLUX.2 [klein] base into two steps.

    arcflow convert --source black-forest-labs/FLUX.2-klein-base-4B --out checkpoints/klein-4b
    arcflow train --config flux2 --config.prompts=prompts.txt

Variants: the default, `flux2:4b`, trains rank 128, 4.8 % of the 4B teacher. `flux2:9b` trains rank 160, 4.4 % of the
9B. `flux2:single` is for one card of 12 GB: the 4B, rank 64, one example at a time, on a quantized base.

    arcflow convert --source black-forest-labs/FLUX.2-klein-base-4B --out checkpoints/klein-4b-int8 --quantize int8
    arcflow embed-prompts --config flux2:single --config.prompts=prompts.txt --out embeddings/klein-4b
    arcflow train --config flux2:single --config.prompts=prompts.txt

None has been run at this size. The student's timestep shift is ArcFlow's 3.2. At 1024 × 1024, the teacher's own is 3.2
for 200 steps, and 7.6 for 50, which compensates for the error of Euler steps. A student has no such error.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "4b") -> ConfigDict:
    ranks = {"4b": 128, "9b": 160, "single": 64}
    if arg not in ranks:
        raise ValueError(f"known variants are {', '.join(ranks)}")
    preview = ("a red fox in fresh snow, early morning light", 'a shop window with the word "OPEN" in neon letters')
    model = "klein-9b" if arg == "9b" else "klein-4b"
    config = ConfigDict({"model": f"checkpoints/{model}", "out": f"runs/flux2-{arg}", "guidance": 4.0})
    config.update(prompts="prompts.txt", steps=10_000, keep_every=2000, preview_every=500, preview_prompts=preview)
    config.adapter = {"rank": ranks[arg]}
    config.distillation = {"decay": 2000, "teacher_guidance": "cfg"}  # [klein] has no guidance embedding
    config.optimizer = {"groups": (("head.proj_out_loggamma.*", 0.1),)}  # log-momenta learn slowly
    if arg == "single":
        config.update(model="checkpoints/klein-4b-int8", embeddings="embeddings/klein-4b", preview_every=0)
        config.update(accumulate=16, remat="full", offload_optimizer=True)
    return config
