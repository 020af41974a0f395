"""What quantized kernels cost: students on a quantized base, students trained on one, and which layers hurt.

    python benchmarks/quantization.py --teacher tiny-flux --out runs/quantization-flux

Distils the bundled teacher three times by its tiny recipe, on the base as it is, in int8 and in int4, and lets each
student sample on bases of all formats, with an NFE of 2. The endpoint error is the mean square distance to the latents
of the teacher as it is in 50 steps from the same noise, for all test prompts and three seeds. Then, for the first
student, only the kernels of one kind are quantized at a time. Prints Markdown tables. Training resumes.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.demo import ASSETS
from arcflow_jax.demo.run import TEACHERS, recipe
from arcflow_jax.generate import TEACHER_STEPS
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.models.model_directory import DESCRIPTION
from arcflow_jax.networks import kernel
from arcflow_jax.networks.conditioning import Guided
from arcflow_jax.networks.layers import linear_layers
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training.loop import train
from arcflow_jax.training.recipe import Recipe

BATCH, NFE = 32, 2
SEEDS = (1, 2, 3)
FORMATS = ("none", "int8", "fp8", "int4")
KINDS = {
    "modulation": ("*.norm.*", "*.norm1*", "*_mod.*"),
    "attention": ("*.attn.*",),
    "MLP": ("*ff*", "*proj_mlp", "*_blocks.proj_out", "*_mlp.*"),
    "embedders and output layer": ("*embed*", "*img_in", "*txt_in", "output.*"),
}


def rounded(pipe: ArcFlowPipeline, format: str, chosen: Callable[[str], bool]) -> nnx.State:
    """The weights of a student whose LoRA stands apart, the chosen kernels as their quantized ones are read."""
    model = nnx.merge(pipe.graphdef, jax.tree.map(lambda x: x, pipe.transformer.state))

    def one(kernel_of_layer: jax.Array) -> jax.Array:
        return qwix.dequantize(kernel.quantized_array(*kernel.quantize(kernel_of_layer, format), format))

    for path, layer in linear_layers(model).items():
        if format != "none" and chosen(path) and kernel.fits(layer.kernel.shape, format):
            weights = layer.kernel[...].astype(jnp.float32)
            layer.kernel[...] = jax.vmap(one)(weights) if weights.ndim > 2 else one(weights)
    return nnx.state(model)


class Judge:
    """The endpoint errors of students, against the teacher as it is."""

    def __init__(self, teacher: ArcFlowPipeline, prompts: Sequence[str], settings: Recipe):
        self.rows, self.columns = teacher.grid()
        self.teacher, guidance = teacher, settings.guidance
        self.batches = []
        for start in range(0, len(prompts), BATCH):
            conditioning = self.encode(prompts[start : start + BATCH], guidance)
            guided: Any = conditioning
            if settings.distillation.teacher_guidance == "cfg":
                negative = self.encode([settings.distillation.negative_prompt] * len(prompts[start : start + BATCH]), 1)
                guided = Guided(conditioning, negative, jnp.float32(guidance))
            for seed in SEEDS:
                count = len(prompts[start : start + BATCH])
                noise = teacher.noise(seed, count, self.rows, self.columns, first=start)
                end = np.asarray(teacher.denoise(noise, guided, TEACHER_STEPS))
                self.batches.append((noise, conditioning, end))

    def encode(self, prompts: Sequence[str], guidance: float) -> Any:
        return self.teacher.encode(prompts, guidance=guidance, rows=self.rows, columns=self.columns)

    def error(self, student: ArcFlowPipeline, state: nnx.State) -> float:
        """Mean square distance of a student's latents with these weights."""
        sizes, sums = 0, 0.0
        for noise, conditioning, end in self.batches:
            made = np.asarray(student._denoise(state, noise, conditioning, NFE, None))
            sizes, sums = sizes + end.size, sums + float(np.square(made - end, dtype=np.float64).sum())
        return sums / sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=sorted(TEACHERS), default="tiny-flux")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--steps", type=int, help="training steps; by default the recipe's")
    arguments = parser.parse_args()
    out, students = arguments.out, {}
    for base in ("none", "int8", "int4"):
        folder = out / base
        if not (folder / "teacher" / DESCRIPTION).exists():
            formats = {} if base == "none" else {"transformer": base}
            convert_model(ASSETS / arguments.teacher, folder / "teacher", quantize=formats)
        settings = recipe(arguments.teacher, folder)
        if arguments.steps is not None:
            settings = Recipe(**{**vars(settings), "steps": arguments.steps})
        train(settings)
        students[base] = ArcFlowPipeline.from_pretrained(out / "none" / "teacher", folder / "arcflow", merge=False)
    teacher = ArcFlowPipeline.from_pretrained(out / "none" / "teacher")
    prompts = read_prompts(TEACHERS[arguments.teacher].world.test_prompts).texts
    judge = Judge(teacher, prompts[: arguments.prompts], settings)

    kept = teacher.directory.networks["transformer"].kept

    def quantized(path: str) -> bool:
        return not any(fnmatch.fnmatchcase(path, pattern) for pattern in kept)

    print(f"{arguments.teacher}: endpoint error by the base that the student samples on\n")
    print(f"| trained on | {' | '.join(FORMATS)} |\n| --- |{' --- |' * len(FORMATS)}")
    for name, student in students.items():
        errors = [judge.error(student, rounded(student, format, quantized)) for format in FORMATS]
        print(f"| {name} | {' | '.join(f'{error:.5f}' for error in errors)} |", flush=True)

    plain = judge.error(students["none"], rounded(students["none"], "none", quantized))
    print(
        f"\nchange of the endpoint error if only these kernels are quantized\n\n| kernels | {' | '.join(FORMATS[1:])} |"
    )
    print(f"| --- |{' --- |' * len(FORMATS[1:])}")
    for kind, patterns in KINDS.items():

        def chosen(path: str, patterns: tuple[str, ...] = patterns) -> bool:
            return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)

        errors = [judge.error(students["none"], rounded(students["none"], format, chosen)) for format in FORMATS[1:]]
        print(f"| {kind} | {' | '.join(f'{100 * (error / plain - 1):+.1f} %' for error in errors)} |", flush=True)


if __name__ == "__main__":
    main()
