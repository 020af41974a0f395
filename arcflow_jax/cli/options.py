"""What the commands that make pictures have in common: options, the student that is meant, progress."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from arcflow_jax.errors import UserError

DEMO = Path("runs/demo")

Model = Annotated[Path, typer.Option(help="What arcflow convert wrote. By default what arcflow demo left.")]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="What arcflow train wrote, or a released student; also a hub id, OWNER/NAME or OWNER/NAME/FOLDER. By "
        "default, with the demo's model, its student."
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="The last iteration's weights instead of the averaged ones.")]
Teacher = Annotated[bool, typer.Option("--teacher", help="Sample from the teacher itself.")]
Steps = Annotated[int | None, typer.Option(help="Network calls. By default the student's own, for the teacher 50.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale. By default the one that the student was trained at, or 3.5.")
]
Height = Annotated[int | None, typer.Option(help="In pixels. By default the model's own.")]
Width = Annotated[int | None, typer.Option(help="In pixels. By default the model's own.")]
FinalStepRatio = Annotated[
    float | None, typer.Option(help="Length of the last step relative to the others. By default as trained.")
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        help='With --teacher: what to guide away from, or "" as Qwen-Image has it. Guidance is then true '
        "classifier-free guidance, by default 4."
    ),
]
NormPreserving = Annotated[
    bool, typer.Option("--norm_preserving", help="True guidance as diffusers has it for Qwen-Image, which keeps norms.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Pictures made at a time. By default 1 for each part that --mesh splits them into."),
]
Mesh = Annotated[
    str,
    typer.Option(
        help="Several devices, e.g. tensor=4 or tensor=2,sequence=4: data splits the batch, fsdp batch and "
        "weights, tensor attention heads and MLPs, sequence image tokens."
    ),
]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="Keep in host memory what is not running: encoders, transformer or decoder."),
]


def which_student(model: Path, adapter: str | None, raw: bool = False, teacher: bool | None = None) -> str | None:
    """The student that is meant, by default the demo's; None for the teacher. Raises UserError if none is named.

    Args:
      teacher: whether the teacher is meant; None where it cannot be.
    """
    if teacher and (adapter is not None or raw):
        superfluous = "--adapter" if adapter is not None else "--raw"
        raise UserError(f"--teacher samples without a student: leave {superfluous} out")
    if teacher or adapter is not None:
        return adapter
    if model != DEMO / "teacher":
        itself = "" if teacher is None else ", or say --teacher for the teacher itself"
        raise UserError(f"name the student with --adapter{itself}")
    return str(DEMO / "arcflow")


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, if that is a terminal: told what is going on, how many pictures are done, and of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    # stdout has the paths, which scroll by above the bar where they share one
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=not console.is_interactive,
    ) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda activity, done, total: bar.update(task, description=activity, completed=done, total=total)
