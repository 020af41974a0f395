"""How much of a style LoRA's effect on the teacher at 50 steps is left on the 2-step student.

    arcflow demo --teacher tiny-flux --out runs/demo-shapes
    python tools/train_style_lora.py --style stripes --out runs/stripes.safetensors
    python benchmarks/style_lora.py --style stripes --lora runs/stripes.safetensors

The effect is measured in pixels, over test prompts of the shapes: for stripes, how much brighter the bright
bands are than the dark ones; for the tint, how much more red than blue there is. Teacher and student start from the
same noise, with and without the LoRA.
"""

# B images, P pixels along a side

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.demo import shapes
from arcflow_jax.pipeline import ArcFlowPipeline
from tools.train_style_lora import BAND

BAR = 0.8


def stripes(pixels: np.ndarray) -> np.ndarray:  # [B, P, P, 3] in [0, 1] -> [B]
    """Mean brightness of the bright bands less that of the dark ones."""
    dark = (np.arange(pixels.shape[1]) // BAND) % 2 == 1
    rows = pixels.mean((2, 3))
    return rows[:, ~dark].mean(1) - rows[:, dark].mean(1)


def tint(pixels: np.ndarray) -> np.ndarray:
    """Mean red less mean blue."""
    return (pixels[..., 0] - pixels[..., 2]).mean((1, 2))


MEASURES = {"stripes": stripes, "tint": tint}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", required=True, help="what tools/train_style_lora.py wrote")
    parser.add_argument("--style", choices=MEASURES, default="stripes")
    parser.add_argument("--model", default="runs/demo-shapes/teacher")
    parser.add_argument("--adapter", default="runs/demo-shapes/arcflow")
    parser.add_argument("--prompts", type=int, default=128, help="how many of the test prompts")
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the LoRA")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    texts, measure = read_prompts(shapes.WORLD.test_prompts).texts[: args.prompts], MEASURES[args.style]
    effects = []
    for name, adapter, steps in (("teacher", None, 50), ("student", args.adapter, 2)):
        pipe = ArcFlowPipeline.from_pretrained(args.model, adapter)
        make = functools.partial(pipe, texts, num_inference_steps=steps, guidance_scale=1.0, batch_size=args.batch_size)
        before = measure(make(output_type="np").images)
        pipe.load_lora_weights(args.lora, scale=args.scale)
        after = measure(make(output_type="np").images)
        effects.append(after - before)
        print(f"{name}, NFE {steps}: {before.mean():.4f} without, {after.mean():.4f} with the LoRA", flush=True)
    teacher, student = effects
    kept = float(student.mean() / teacher.mean())
    result = {
        "style": args.style,
        "scale": args.scale,
        "prompts": len(texts),
        "effect on the teacher": round(float(teacher.mean()), 4),
        "effect on the student": round(float(student.mean()), 4),
        "kept": round(kept, 3),
        "correlation over prompts": round(float(np.corrcoef(teacher, student)[0, 1]), 3),
        "bar": BAR,
        "reached": kept >= BAR,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
