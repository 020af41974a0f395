"""LoRA merged into the base model's weights, or computed beside them: which is closer to the float32 student?

    arcflow convert --source arcflow_jax/assets/tiny-flux --out /tmp/teacher
    arcflow train --config configs/tiny.py --config.model=/tmp/teacher --config.steps=200 --config.out=/tmp/student
    python benchmarks/merge_precision.py /tmp/teacher /tmp/student

Prints relative errors of the endpoint latents against the student in float32, root mean square over prompts: with
everything in bfloat16, as on an accelerator; and with float32 arithmetic on bfloat16 weights, which shows the rounding
of the weights alone. "base model" is the teacher's weights with the student's head, no LoRA: an error as large as this
one means that the LoRA update is lost.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.demo import ASSETS
from arcflow_jax.pipeline import ArcFlowPipeline

BATCH = 16


def latents(pipe: ArcFlowPipeline, encode: Callable, prompts: list[str]) -> np.ndarray:
    """Endpoint latents [P, N, 4C] of P prompts."""
    rows, columns = pipe.grid()
    made = []
    for i in range(0, len(prompts), BATCH):
        conditioning = encode(prompts[i : i + BATCH], guidance=pipe.student.guidance, rows=rows, columns=columns)
        noise = pipe.noise(0, len(prompts[i : i + BATCH]), rows, columns, first=i)
        made.append(np.asarray(pipe.denoise(noise, conditioning, pipe.settings().steps), np.float64))
    return np.concatenate(made)


def without_lora(state: nnx.State) -> nnx.State:
    """The state of a student whose LoRA stands apart, LoRA set to zero."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, x.replace(x.get_value() * 0) if path[-1] == "b" else x) for path, x in flat])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what arcflow convert wrote")
    parser.add_argument("students", nargs="+", help="what arcflow train wrote")
    parser.add_argument("--prompts", default=str(ASSETS / "shapes" / "prompts-test.txt"))
    parser.add_argument("--count", type=int, default=64, help="number of prompts")
    parser.add_argument("--raw", action="store_true", help="the last training step's weights, not the EMA weights")
    args = parser.parse_args()
    prompts = read_prompts(args.prompts).texts[: args.count]
    print("student, LoRA, bfloat16, bfloat16 weights only")
    for student in args.students:
        settings = {"adapter": student, "raw": args.raw}
        exact = ArcFlowPipeline.from_pretrained(args.model, dtype=jnp.float32, merge=False, **settings)
        encode = exact.encode
        reference = latents(exact, encode, prompts)

        def error(pipe: ArcFlowPipeline, encode=encode, reference=reference) -> float:
            difference = latents(pipe, encode, prompts) - reference
            return float(np.sqrt(np.square(difference).mean() / np.square(reference).mean()))

        for name, merge in (("merged", True), ("apart", False)):
            rounded = ArcFlowPipeline.from_pretrained(args.model, dtype=jnp.bfloat16, merge=merge, **settings)
            whole = error(rounded)
            widened = ArcFlowPipeline.from_pretrained(args.model, dtype=jnp.float32, merge=merge, **settings)
            widened.transformer.state = jax.tree.map(lambda x: x.astype(jnp.float32), rounded.transformer.state)
            print(f"{student}, {name}, {whole:.2e}, {error(widened):.2e}", flush=True)
        exact.transformer.state = without_lora(exact.transformer.state)
        print(f"{student}, base model, , {error(exact):.2e}", flush=True)


if __name__ == "__main__":
    main()
