"""How far is a few-step student from the 50-step teacher, when both start from an image with noise?

    arcflow convert --source arcflow_jax/assets/tiny-flux --out /tmp/teacher
    arcflow train --config tiny --config.model=/tmp/teacher --config.out=/tmp/student
    python benchmarks/image_to_image.py /tmp/teacher /tmp/student

The images to start from are the teacher's, of other prompts than those that they are turned into. For each strength,
student and teacher start from the same latents. The error is that of the latents at the end, root mean square over
prompts, relative to the teacher's on its 50 steps' schedule. "few" is the teacher in as many Euler steps as the student
has network evaluations, evenly spaced in σ. "changed" is how far the given image is from what the 50-step teacher makes
of it, on the same scale. The last row starts from noise alone.

With --mask, the left half of the image is kept, and the error is that of the right half.
"""

from __future__ import annotations

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.demo import ASSETS
from arcflow_jax.flow import sampler
from arcflow_jax.flow.schedule import boundaries, sigma_of
from arcflow_jax.generate import TEACHER_STEPS
from arcflow_jax.image_to_image import start_level
from arcflow_jax.pipeline import ArcFlowPipeline

BATCH = 16


def calls(pipe: ArcFlowPipeline, start: float, steps: int) -> int:
    """The student's network evaluations from noise level `start` on."""
    trained = pipe.student.distillation
    grid = np.asarray(sigma_of(boundaries(steps, trained.final_step_ratio), trained.shift))
    return int((grid[:-1] > 0).sum() - min((grid[1:] > start - sampler.SAME_LEVEL).sum(), steps - 1))


def few_steps(
    teacher: ArcFlowPipeline, prompts: list[str], guidance: float, clean: np.ndarray, start: float, steps: int
) -> np.ndarray:
    """The teacher's latents after a few Euler steps, evenly spaced in σ, from an image with the noise of seed 0."""

    @jax.jit
    def run(state: nnx.State, latents: jax.Array, conditioning: object) -> jax.Array:
        model = nnx.merge(teacher.graphdef, state)
        levels = jnp.linspace(start, 0.0, steps + 1)
        for level, following in itertools.pairwise(levels):
            velocity = model.teacher_velocity(latents, jnp.full(len(latents), level), conditioning)
            latents = latents + (following - level) * velocity
        return latents

    rows, columns = teacher.grid()
    made = []
    for i in range(0, len(prompts), BATCH):
        batch = prompts[i : i + BATCH]
        conditioning = teacher.encode(batch, guidance=guidance, rows=rows, columns=columns)
        noise = teacher.noise(0, len(batch), rows, columns, first=i)
        latents = sampler.noised(clean[i : i + BATCH], noise, start)
        made.append(np.asarray(run(teacher.transformer.state, latents, conditioning)))
    return np.concatenate(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what arcflow convert wrote")
    parser.add_argument("student", help="what arcflow train wrote")
    parser.add_argument("--prompts", default=str(ASSETS / "shapes" / "prompts-test.txt"))
    parser.add_argument("--count", type=int, default=64, help="number of prompts, a multiple of 16")
    parser.add_argument("--steps", type=int, default=2, help="NFE of the student from noise alone")
    parser.add_argument("--mask", action="store_true", help="keep the left half (inpainting)")
    args = parser.parse_args()
    teacher = ArcFlowPipeline.from_pretrained(args.model)
    student = ArcFlowPipeline.from_pretrained(args.model, args.student)
    prompts = read_prompts(args.prompts).texts[: args.count]
    guidance = {"guidance_scale": student.student.guidance, "batch_size": BATCH}
    given = np.stack([np.asarray(image) for image in teacher(prompts[::-1], seed=1, **guidance).images])
    settings = {"seed": 0, "output_type": "latent", **guidance}
    clean = teacher._image_encoder()(given)
    rows, columns = teacher.grid()
    scored = np.ones((rows, columns), bool)
    masks = {}
    if args.mask:
        scored[:, : columns // 2] = False
        side = given.shape[2] // columns
        masks["mask_image"] = np.kron(scored, np.ones((side, side), bool))

    def error(made: np.ndarray, exact: np.ndarray) -> float:
        made, exact = (x[:, scored.ravel()].astype(np.float64) for x in (made, exact))
        return float(np.sqrt(np.square(made - exact).mean() / np.square(exact).mean()))

    print("| strength | σ | student's NFE | student | teacher, few | changed |\n| --- | --- | --- | --- | --- | --- |")
    for strength in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, None):
        start = {} if strength is None else {"image": list(given), "strength": strength, **masks}
        exact = teacher(prompts, num_inference_steps=TEACHER_STEPS, **start, **settings).images
        made = student(prompts, num_inference_steps=args.steps, **start, **settings).images
        level = float(start_level(teacher.directory, rows * columns, strength or 1.0, TEACHER_STEPS))
        nfe = calls(student, level, args.steps)
        few = ""
        if not args.mask:
            few = f"{error(few_steps(teacher, prompts, student.student.guidance, clean, level, nfe), exact):.3f}"
        row = [strength or "noise", f"{level:.3f}", nfe, f"{error(made, exact):.3f}", few, f"{error(clean, exact):.3f}"]
        print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main()
