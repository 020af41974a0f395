"""Trains the bundled teachers, `arcflow_jax/assets/tiny-…`, and their judges, from scratch.

    python tools/train_tiny_teacher.py --work /tmp/tiny                # every stage that is not done yet
    python tools/train_tiny_teacher.py --work /tmp/tiny guided         # one stage again
    python tools/train_tiny_teacher.py --work /tmp/qwen --kind qwen    # the same images as a Qwen-Image
    python tools/train_tiny_teacher.py --work /tmp/flux2 --kind flux2  # and as a FLUX.2 [klein] base
    python tools/train_tiny_teacher.py --work /tmp/emoji --kind emoji  # the emoji world's FLUX.1; needs its font

On two free CPU cores a step of the shapes' VAE or denoiser takes about 0.17 s, and there are 4 500 and 11 000 of them.

This script makes the bundled Qwen-Image and FLUX.2 exactly, in 53 and 55 minutes on a busy machine. The bundled FLUX.1
is not exactly what it makes. Its text encoders, judge, VAE and denoiser come from an earlier version of
`arcflow_jax.demo.shapes`, whose captions could also omit the position. On the present version, the VAE was trained for
1 000 more steps (learning rate 1e-3, without the straightness term), the denoiser for 3 500 (as in its second round),
then `guided` in two parts.

Nor is the bundled teacher of the emoji. The first rounds of its VAE and of its denoiser come from an earlier version of
`arcflow_jax.demo.emoji`, with any size between small and large and any place. The text encoders were trained with "a
orange background"; the token "an" has the embedding of "a". The second round of the denoiser had half as many images,
and the first 500 steps of the third had the learning rate of a round of 8 000.

Everything is seeded. Each stage reads what earlier stages left in the work folder. A training that was stopped resumes
from its last report, every few hundred steps. Copy `tiny-…/` from the work folder to `arcflow_jax/assets/`, and the
judge, the prompts and `true-features.safetensors` to the world's folder there.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arcflow_jax.demo.world import TRUE_FEATURES
from tools.tiny_teacher import flux2, qwen
from tools.tiny_teacher.assemble import assemble
from tools.tiny_teacher.denoiser import make_denoiser, make_guided, make_latents
from tools.tiny_teacher.emoji import EMOJI
from tools.tiny_teacher.glyphs import make_glyphs
from tools.tiny_teacher.judge import make_judge
from tools.tiny_teacher.measure import check_vae, make_true_features, measure
from tools.tiny_teacher.shapes import SHAPES
from tools.tiny_teacher.teacher import Teacher
from tools.tiny_teacher.text import make_text
from tools.tiny_teacher.vae import make_vae

# stage: its function, and what it leaves in the work folder
Stages = dict[str, tuple[Callable[[Path], None], str]]


def flux(teacher: Teacher) -> Stages:
    made = {
        "vae": (make_vae, "vae.safetensors"),
        "judge": (make_judge, "judge.safetensors"),
        "check": (check_vae, "vae.png"),
        "text": (make_text, "text"),
        "latents": (make_latents, "latents.safetensors"),
        "denoiser": (make_denoiser, "denoiser.safetensors"),
        "guided": (make_guided, "guided.safetensors"),
        "assemble": (assemble, teacher.name),
        "measure": (measure, "measures.json"),
        "truth": (make_true_features, TRUE_FEATURES),
    }
    return {stage: (functools.partial(make, teacher=teacher), result) for stage, (make, result) in made.items()}


QWEN: Stages = {
    "vae": (qwen.make_vae, "vae.safetensors"),
    "text": (qwen.make_text, "text"),
    "latents": (qwen.make_latents, "latents.safetensors"),
    "embeddings": (qwen.make_embeddings, "embeddings.safetensors"),
    "denoiser": (qwen.make_denoiser, "denoiser.safetensors"),
    "assemble": (qwen.assemble, "tiny-qwen"),
}
FLUX2: Stages = {
    "text": (flux2.make_text, "text"),
    "latents": (flux2.make_latents, "latents.safetensors"),
    "embeddings": (flux2.make_embeddings, "embeddings.safetensors"),
    "denoiser": (flux2.make_denoiser, "denoiser.safetensors"),
    "assemble": (flux2.assemble, "tiny-flux2"),
}
KINDS: dict[str, Stages] = {
    "flux": flux(SHAPES),
    "qwen": QWEN,
    "flux2": FLUX2,
    "emoji": {"glyphs": (make_glyphs, "glyphs.safetensors"), **flux(EMOJI)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage for stages in KINDS.values() for stage in stages]
    parser.add_argument("stages", nargs="*", choices=[[], *dict.fromkeys(names)], help="default: all not done yet")
    parser.add_argument("--kind", choices=KINDS, default="flux")
    parser.add_argument("--work", type=Path, required=True, help="folder for the stages' results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stages = KINDS[args.kind]
    if unknown := set(args.stages) - stages.keys():
        parser.error(f"{args.kind} has no stage {', '.join(unknown)}")
    for name in args.stages or [name for name, (_, made) in stages.items() if not (args.work / made).exists()]:
        print(f"== {name}", flush=True)
        stages[name][0](args.work)


if __name__ == "__main__":
    main()
