"""`arcflow convert` and `arcflow export`: models and students from PyTorch, and back; `arcflow verify`."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from arcflow_jax.cli.options import LORA_HELP, parse_path, path_option
from arcflow_jax.errors import UserError


class Precision(enum.StrEnum):
    bfloat16 = enum.auto()
    float32 = enum.auto()


QUANTIZE_HELP = (
    "Quantize the kernels of transformer and text encoders to int8, fp8 or int4; or of some of them, e.g. "
    "transformer=int4,text_encoder_2=int8."
)


class ExportPrecision(enum.StrEnum):
    float16 = enum.auto()
    bfloat16 = enum.auto()
    float32 = enum.auto()


def convert(
    out: Annotated[Path, path_option(help="The directory to write. It must not exist yet, or be empty.")],
    source: Annotated[
        str | None,
        typer.Option(
            help="The PyTorch model, FLUX.1, FLUX.2 [klein] base or Qwen-Image: a diffusers folder with "
            "model_index.json and the folders that it names (transformer/, text_encoder/, vae/, …), weights in "
            "safetensors; or a hub id, OWNER/NAME."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id. By default the main branch.")
    ] = None,
    transformer: Annotated[
        Path | None,
        path_option(
            help="A single file with the transformer's weights, such as flux1-dev.safetensors, in the authors' layout "
            "or diffusers'. Of SOURCE/transformer, only config.json is then needed."
        ),
    ] = None,
    vae: Annotated[
        Path | None,
        path_option(help="The same for the VAE, such as ae.safetensors; needs SOURCE/vae/config.json."),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Precision of the weights. By default each component keeps its own."),
    ] = None,
    quantize: Annotated[str | None, typer.Option(help=f"{QUANTIZE_HELP} By default none.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{LORA_HELP} It is added to the converted weights, which are then another base.", metavar="LORA"
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Instead of --source: a released student, a folder with config.json and "
            "diffusion_pytorch_model.safetensors, or that file; or a hub id, OWNER/NAME or OWNER/NAME/FOLDER. Needs "
            "--base."
        ),
    ] = None,
    base: Annotated[
        Path | None, path_option(help="The converted model that the released student was distilled from.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="NFE of the released student. By default what its file says, or 2.")
    ] = None,
    shift: Annotated[float | None, typer.Option(help="Timestep shift. By default what its file says, or 3.2.")] = None,
    final_step_ratio: Annotated[
        float | None,
        typer.Option(help="Relative length of its last segment. By default what its file says, or 1.0."),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Its guidance scale. By default what its file says, or the published one.")
    ] = None,
) -> None:
    """Converts a PyTorch model to a model directory for training and sampling, or a released student to an adapter
    for arcflow sample.

    Every tensor is checked by name, shape and value; nothing is filled in or left out. OUT appears at the end,
    complete, or not at all.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no arithmetic here: leave an accelerator, if any, to others
    sampling = {"steps": steps, "shift": shift, "final_step_ratio": final_step_ratio, "guidance": guidance}
    if adapter is not None:
        if base is None or any(value is not None for value in (source, transformer, vae, dtype, quantize, lora)):
            raise UserError("a released student, --adapter, is converted with --base, and without a model's options")
        from arcflow_jax.checkpoints.student_formats import import_adapter

        print(f"converted {adapter} to {import_adapter(adapter, base, out, revision, **sampling)}")
        return
    if source is None:
        raise UserError("name the model to convert with --source, or a released student with --adapter")
    if base is not None or any(value is not None for value in sampling.values()):
        raise UserError("--base, --steps, --shift, --final-step-ratio and --guidance belong to --adapter")
    from arcflow_jax.models.conversion import convert_model
    from arcflow_jax.models.style_loras import split_scale

    loras = [split_scale(text) for text in lora or ()]
    files = {name: file for name, file in {"transformer": transformer, "vae": vae}.items() if file is not None}
    formats = None if quantize is None else parse_formats(quantize)
    converted = convert_model(source, out, dtype and dtype.value, revision, files, formats, loras)
    print(f"converted {source} to {converted}")


def parse_formats(text: str) -> Any:
    """What --quantize says, as `conversion.convert_model` takes it. Raises UserError."""
    if "=" not in text:
        return text
    parts = [part.partition("=") for part in text.split(",")]
    if not all(name and format for name, _, format in parts):
        raise UserError(f"--quantize {text}: give a format, or COMPONENT=FORMAT, separated by commas")
    return {name: format for name, _, format in parts}


def quantize(
    model: Annotated[Path, path_option(help="A directory that arcflow convert wrote, which is not quantized.")],
    out: Annotated[Path, path_option(help="The directory to write. It must not exist yet, or be empty.")],
    formats: Annotated[str, typer.Option("--quantize", help=QUANTIZE_HELP)] = "int8",
) -> None:
    """Writes a model directory again with quantized kernels, for devices that cannot hold the whole model.

    Adapters fit both, because both are of the same source.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # leave an accelerator, if any, to others
    from arcflow_jax.models.quantize import quantize_model

    print(f"quantized {model} to {quantize_model(model, out, parse_formats(formats))}")


def verify(
    directory: Annotated[
        Path,
        typer.Argument(
            help="What arcflow convert, train, export or embed-prompts wrote.", metavar="DIR", parser=parse_path
        ),
    ],
) -> None:
    """Checks a model, run, export or cache of embeddings in full: reads every tensor, and compares checksums.

    Loading checks what it reads. This checks all, for instance after a copy. Exits with 2 if a part is damaged.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no arithmetic here: leave an accelerator, if any, to others
    from arcflow_jax.checkpoints.verify import verify as check

    print(f"{directory} is whole: {check(directory)} parts")


class Layout(enum.StrEnum):
    arcflow = enum.auto()
    diffusers = enum.auto()
    comfyui = enum.auto()


def export(
    adapter: Annotated[Path, path_option(help="A directory that arcflow train wrote.")],
    out: Annotated[Path, path_option(help="The directory to write. It must not exist yet, or be empty.")],
    layout: Annotated[
        Layout,
        typer.Option(
            "--format",
            help="arcflow: the layout of the ArcFlow authors' releases, config.json and safetensors, for their PyTorch "
            "loader. diffusers: the same files and a pipeline.py, with which diffusers samples any student, and a "
            "model card. comfyui: all that, and the files of a custom node for ComfyUI.",
        ),
    ] = Layout.arcflow,
    raw: Annotated[
        bool, typer.Option("--raw", help="Take the weights of the last training step instead of the EMA weights.")
    ] = False,
    dtype: Annotated[ExportPrecision, typer.Option(help="Precision of the tensors.")] = ExportPrecision.float16,
    push: Annotated[
        str | None,
        typer.Option(help="With --format diffusers or comfyui: a hub id, OWNER/NAME, to upload the folder to as well."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="With --format diffusers or comfyui: the hub id of the base model, OWNER/NAME, for the model card and "
            "ComfyUI's nodes; --push needs it."
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        path_option(
            help="With --format diffusers or comfyui: a report of arcflow evaluate metrics, for the model card."
        ),
    ] = None,
) -> None:
    """Writes a student for PyTorch: in the layout of the ArcFlow authors' releases, or as a folder for diffusers or
    ComfyUI."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no arithmetic here: leave an accelerator, if any, to others
    card = {"push": push, "base_model": base_model, "figures": figures}
    if layout is not Layout.arcflow:
        from arcflow_jax.checkpoints.diffusers_folder import export_diffusers

        nodes = layout is Layout.comfyui
        done = export_diffusers(adapter, out, raw=raw, dtype=dtype.value, comfyui=nodes, **card)
    else:
        if given := [f"--{name.replace('_', '-')}" for name, value in card.items() if value is not None]:
            raise UserError(f"{', '.join(given)}: for --format diffusers and comfyui only, which have a model card")
        from arcflow_jax.checkpoints.student_formats import export_adapter

        done = export_adapter(adapter, out, raw=raw, dtype=dtype.value)
    print(f"exported {adapter} to {done}" + (f" and to https://huggingface.co/{push}" if push else ""))
