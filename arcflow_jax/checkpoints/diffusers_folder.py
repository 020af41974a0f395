"""A student as a folder that diffusers samples in PyTorch, without this library; on the hub too.

    FOLDER/pipeline.py                             what diffusers runs (`diffusers_pipeline`)
    FOLDER/config.json                             as in the authors' layout, and `student_formats.Record`
    FOLDER/diffusion_pytorch_model.safetensors     head, output norm and LoRA (PEFT's names), as in the authors' layout
    FOLDER/README.md                               the model card
    FOLDER/__init__.py, requirements.txt           for ComfyUI, if asked for: `comfyui_nodes`, and what they need

The authors' loader reads the same files if their layout can hold the student (`student_formats.misfit`), and this
library opens the folder as an adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from huggingface_hub import ModelCardData

from arcflow_jax import families, schema
from arcflow_jax.checkpoints.student_formats import CONFIG, RECORD, WEIGHTS, Record, exported, misfit, policy_of
from arcflow_jax.checkpoints.training import DESCRIPTION
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.storage import hub
from arcflow_jax.storage.atomic import new_output, whole_directory, write_file
from arcflow_jax.storage.files import read_json, write_json
from arcflow_jax.storage.paths import as_path, in_bucket
from arcflow_jax.storage.safetensors import write_tensors

PIPELINE = Path(__file__).with_name("diffusers_pipeline.py")
NODES = Path(__file__).with_name("comfyui_nodes.py")
NEEDED = "diffusers>=0.42\npeft>=0.17\naccelerate\n"  # diffusers as tested; ComfyUI has torch and transformers
HERE = "PATH/TO/THIS/FOLDER"
IN_COMFYUI = (
    "Put this folder into `ComfyUI/custom_nodes`, run `pip install -r requirements.txt` in it with ComfyUI's Python, "
    "and start ComfyUI again. The nodes are in the category ArcFlow. They were checked against ComfyUI's contract, not "
    "run in ComfyUI."
)


def export_diffusers(
    run: str | Path,
    out: str | Path,
    *,
    raw: bool = False,
    dtype: Any = np.float16,
    base_model: str | None = None,
    figures: str | Path | None = None,
    push: str | None = None,
    comfyui: bool = False,
) -> Path:
    """Writes a student as a folder for diffusers, and returns `out`.

    Args:
      run, raw, dtype: as for `student_formats.export_adapter`. Every student fits.
      out: a directory that does not exist yet, or is empty. It appears complete, or not at all.
      base_model: hub id of the base model, owner/name, for the model card. A run does not know it.
      figures: a report of `arcflow evaluate metrics` on this student, for the model card.
      push: a hub id, owner/name, to upload the folder to afterwards; needs `base_model`.
      comfyui: whether the folder is also one of custom nodes for ComfyUI, which offer `base_model`.

    Raises:
      UserError: if `run` holds no student, a value does not fit in `dtype`, `figures` is no such report, `out` cannot
        be written, or the upload fails; the folder is complete then.
    """
    run, out = as_path(run), as_path(out).absolute()
    for id in (push, base_model):
        if id is not None and hub.split_folder(f"{hub.PREFIX}{id}") != (id, ""):
            raise UserError(f"{id} is no hub id of a model, which has the form owner/name")
    if push is not None and base_model is None:
        raise UserError("a model card on the hub names the base model: add --base-model OWNER/NAME")
    if push is not None and in_bucket(out):
        raise UserError(f"only a folder on a disk can be uploaded to the hub: {out} is in a bucket")
    measured = {} if figures is None else read_figures(as_path(figures))
    with new_output(out, WEIGHTS):
        description, config, tensors = exported(run, raw, jnp.dtype(dtype))
        adapter, trained = description.adapter, description.distillation
        if description.pipeline is not None:
            pipeline = families.of_pipeline(description.pipeline, run / DESCRIPTION).pipeline
        else:
            pipeline = families.of_transformer(description.transformer.class_name, run / DESCRIPTION).pipeline
        record = Record(
            steps=trained.nfe,
            shift=trained.shift,
            final_step_ratio=trained.final_step_ratio,
            guidance=description.guidance,
            pipeline=pipeline,
            base=description.base,
            curve=adapter.basis,
            modes=adapter.modes,
        )
        metadata = {"policy_config": json.dumps(policy_of(description, run))} if misfit(description) is None else {}
        lora = f"rank {adapter.rank}" if adapter.targets else "none"
        card = model_card(record, lora, base_model, push, measured, comfyui)
        with whole_directory(out, sum(tensor.nbytes for tensor in tensors.values())) as aside:
            write_file(aside / "README.md", card.encode())
            write_file(aside / PIPELINE.name.removeprefix("diffusers_"), pipeline_source(pipeline).encode())
            if comfyui:
                write_file(aside / "__init__.py", nodes_source(base_model).encode())
                write_file(aside / "requirements.txt", NEEDED.encode())
            write_json(aside / CONFIG, dict(sorted(config.items())) | {RECORD: schema.unparse(record)})
            write_tensors(aside / WEIGHTS, tensors, metadata=metadata)
    if push is not None:
        try:
            hub.upload(out, push)
        except UserError as error:
            raise type(error)(f"{out} is complete, but not on the hub: {error}") from error
    return out


def pipeline_source(pipeline: str) -> str:
    """The text of pipeline.py for a class of pipelines in diffusers: ours is written for one, and names it once."""
    return PIPELINE.read_text(encoding="utf-8").replace("import FluxPipeline as", f"import {pipeline} as")


def nodes_source(base_model: str | None) -> str:
    """The text of __init__.py for ComfyUI."""
    return NODES.read_text(encoding="utf-8").replace('BASE_MODEL = ""', f"BASE_MODEL = {json.dumps(base_model or '')}")


def read_figures(report: Path) -> dict[str, float]:
    """The figures of a report of `arcflow evaluate metrics`, by name. Raises UserError if it has none."""
    content = read_json(report)
    found = {
        f"{metric} to the {one_line(reference)} images": value
        for metric in ("fid", "pfid")
        for reference, value in schema.nested(content, metric).items()
    }
    if score := schema.nested(content, "clip").get("score"):
        found["clip score"] = score
    if not found or not all(isinstance(value, int | float) for value in found.values()):
        raise UserError(f"{report} has no figures: arcflow evaluate metrics writes a report with fid, pfid or clip")
    count = schema.nested(content, "images").get("count")
    return found | ({"images": count} if isinstance(count, int) else {})


def model_card(
    record: Record,
    lora: str,
    base_model: str | None,
    repository: str | None,
    figures: Mapping[str, Any],
    comfyui: bool,
) -> str:
    """README.md of a student: the hub's metadata as YAML, then settings, use, figures and licence."""
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license="other",
        license_name="that-of-the-base-model",
        license_link=f"https://huggingface.co/{base_model}" if base_model else None,
        tags=["arcflow", "few-step", "flow-matching", *(["lora"] if lora != "none" else [])],
    )
    base, here = base_model or "BASE", repository or HERE
    link = f"[{base}](https://huggingface.co/{base})" if base_model else f"a base model of diffusers' {record.pipeline}"
    settings = {
        "network evaluations (NFE)": record.steps,
        "timestep shift": f"{record.shift:g}",
        "final-step ratio": f"{record.final_step_ratio:g}",
        "guidance scale of the teacher": f"{record.guidance:g}",
        "curve": f"{record.curve}, {record.modes} {'modes' if record.curve == 'momentum' else 'coefficients'}",
        "LoRA": lora,
        "base model's fingerprint": f"`{record.base[:16]}…`",
    }

    def table(rows: Mapping[str, Any]) -> str:
        return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])

    sections = [
        f"# A {record.steps}-step student of {base}",
        f"Distilled from {link} with ArcFlow ([arXiv 2602.09014](https://arxiv.org/abs/2602.09014)) in arcflow_jax. It "
        "predicts the velocity on a whole segment of noise levels, which is then integrated in closed form.",
        table(settings),
        "## In diffusers",
        "```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained(\n    "{base}", custom_pipeline="{here}", trust_remote_code=True, '
        'torch_dtype=torch.bfloat16\n).to("cuda")\nimage = pipe("a red fox in the snow").images[0]\n```',
        "`trust_remote_code=True` lets diffusers run `pipeline.py`, some 200 lines. It needs `diffusers` and `peft`.",
        *(["## In ComfyUI", IN_COMFYUI] if comfyui else []),
        "## In arcflow_jax",
        f'    arcflow sample --model {base} --adapter {here} --prompt "a red fox in the snow"',
        *(["## Figures", "By `arcflow evaluate metrics`.", table(figures)] if figures else []),
        "## Licence",
        f"A student is made from its base model and does not work without it. The licence of {link} applies to it.",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
