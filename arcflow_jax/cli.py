"""The command line, `arcflow`: each command parses, imports its worker, calls it and prints.

Workers are imported where they are called, so that `--help` does not wait for JAX.
"""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from arcflow_jax.errors import UserError

app = typer.Typer(
    help="ArcFlow in JAX: distils large text-to-image models into 2-step generators.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def arcflow() -> None:
    """Keeps the commands subcommands, even if there is only one."""


class Precision(enum.StrEnum):
    bfloat16 = enum.auto()
    float32 = enum.auto()


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Option(
            help="The PyTorch model: a diffusers folder with model_index.json, transformer/, text_encoder/, "
            "text_encoder_2/, vae/, tokenizer/, tokenizer_2/ and scheduler/, weights as safetensors."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The model directory to write. It must not exist yet, or be empty.")],
    dtype: Annotated[
        Precision | None, typer.Option(help="Of the converted weights. By default each component keeps its own.")
    ] = None,
) -> None:
    """Converts a PyTorch FLUX.1 model to a model directory for training and sampling.

    Every tensor is checked by name, shape and value; nothing is filled in or left out. OUT appears complete at the
    end, or not at all.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no arithmetic here: leave an accelerator, if any, to others
    from arcflow_jax.conversion import convert_model

    print(f"converted {source} to {convert_model(source, out, dtype and dtype.value)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: with 0, with 2 and one line on stderr for what a user can put right."""
    try:
        app(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
