"""Options that several commands share, each declared once, and what the commands do with them."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import inspect
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from arcflow_jax.errors import UserError
from arcflow_jax.storage.paths import as_path

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from arcflow_jax.pipeline import ArcFlowPipeline


class Offload(enum.StrEnum):
    networks = enum.auto()
    blocks = enum.auto()


class EightBits(enum.StrEnum):
    int8 = enum.auto()
    fp8 = enum.auto()


DEMO = Path("runs/demo")
LORA_HELP = (
    "A style LoRA, FILE_OR_HUB_ID[:SCALE]: a safetensors file, a folder with one, or a hub id, OWNER/NAME or "
    "OWNER/NAME/FILE.safetensors. May be given several times."
)


def parse_path(text: str | Path) -> Path:
    """A path of the command line, local or in a bucket."""
    try:
        return as_path(text)
    except UserError as error:
        raise typer.BadParameter(str(error)) from None


def path_option(*, help: str, **more: Any) -> Any:
    """An option that is a path, local or in a bucket."""
    return typer.Option(help=help, parser=parse_path, metavar="PATH", **more)


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorates a command: a parameter whose type is a dataclass becomes one option for each of its fields.

    Typer sees the options, and the command gets the dataclass.
    """
    signature = inspect.signature(command, eval_str=True)
    groups = {name: each.annotation for name, each in signature.parameters.items() if is_group(each.annotation)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        parameters += options_of(groups[name]) if name in groups else [parameter.replace(kind=KEYWORD)]

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        filled = {
            name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**values, **filled)

    setattr(expanded, "__signature__", signature.replace(parameters=parameters))  # noqa: B010
    expanded.__annotations__ = {each.name: each.annotation for each in parameters}
    return expanded


KEYWORD = inspect.Parameter.KEYWORD_ONLY


def is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def options_of(group: Any) -> list[inspect.Parameter]:
    """The fields of a dataclass as parameters with typer's annotations."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(field.name, KEYWORD, default=field.default, annotation=hints[field.name])
        for field in dataclasses.fields(group)
    ]


@dataclasses.dataclass(frozen=True)
class HostOptions:
    """How the processes of a command on several hosts find one another."""

    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of the first of several processes, as the others reach it.")
    ] = None
    processes: Annotated[int | None, typer.Option(help="How many processes run this command, on all hosts.")] = None
    process_id: Annotated[int | None, typer.Option(help="The number of this process, from 0.")] = None

    @contextlib.contextmanager
    def connected(self) -> Generator[None]:
        """Inside the `with` block the processes are connected, and end together. Raises UserError if they cannot."""
        from arcflow_jax.parallel import failure, processes, together

        processes.initialize(self.coordinator, self.processes, self.process_id)
        with failure.ends_together():
            yield
            together.wait_for_all()  # JAX treats a process that ends minutes early as dead


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model and student, on which devices."""

    model: Annotated[
        Path,
        path_option(
            help="A directory that arcflow convert wrote; or a diffusers folder or hub id, OWNER/NAME, which is "
            "converted into a cache on first use. By default the demo's teacher."
        ),
    ] = DEMO / "teacher"
    adapter: Annotated[
        str | None,
        typer.Option(
            help="A directory that arcflow train wrote, or a released student; also a hub id, OWNER/NAME or "
            "OWNER/NAME/FOLDER. By default, with the demo's teacher, the demo's student."
        ),
    ] = None
    raw: Annotated[
        bool, typer.Option("--raw", help="Take the weights of the last training step instead of the EMA weights.")
    ] = False
    mesh: Annotated[
        str,
        typer.Option(
            help="How to use several devices, e.g. tensor=4 or tensor=2,sequence=4: data splits the batch, fsdp batch "
            "and weights, tensor attention heads and MLPs, sequence image tokens."
        ),
    ] = ""


@dataclasses.dataclass(frozen=True)
class StudentOptions(ModelOptions):
    """What every command that samples has."""

    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0
    height: Annotated[int | None, typer.Option(help="Height in pixels. By default the model's own.")] = None
    width: Annotated[int | None, typer.Option(help="Width in pixels. By default the model's own.")] = None
    norm_preserving: Annotated[
        bool,
        typer.Option("--norm-preserving", help="Norm-preserving CFG, which diffusers uses for Qwen-Image."),
    ] = False
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images per batch. By default 1 for each part into which --mesh splits a batch."),
    ] = None

    def student(self) -> str:
        """The student's adapter. Raises UserError if none is named and the model is not the demo's."""
        return which_student(self.model, self.adapter)


@dataclasses.dataclass(frozen=True)
class LoadingOptions(ModelOptions):
    """How a model is loaded for sampling."""

    teacher: Annotated[bool, typer.Option("--teacher", help="Sample from the teacher itself.")] = False
    merge: Annotated[
        bool | None,
        typer.Option(
            "--merge/--no-merge",
            help="Add LoRA to the base model's weights, or compute it beside them, which is slower but does not round "
            "the sums to bfloat16. By default added, unless the base model is quantized, or with --offload blocks.",
        ),
    ] = None
    lora: Annotated[list[str] | None, typer.Option(help=LORA_HELP, metavar="LORA")] = None
    adapter_scale: Annotated[
        float, typer.Option(help="Strength of the student's own LoRA. Its head stays as it is.")
    ] = 1.0
    compute: Annotated[
        EightBits | None,
        typer.Option(
            help="Multiply activations in 8 bits as well, if the weights are int8 or fp8: on chips that support it."
        ),
    ] = None
    offload: Annotated[
        Offload | None,
        typer.Option(
            help="Keep in host memory the networks that are not running (text encoders, transformer, VAE decoder); or "
            "also the blocks of the running one, which are copied to the device one after another."
        ),
    ] = None
    vae_tiling: Annotated[
        bool | None,
        typer.Option(
            "--vae-tiling/--no-vae-tiling",
            help="Decode in tiles: the same image with less memory, but slower. By default above 1536x1536 pixels.",
        ),
    ] = None

    def adapter_or_teacher(self) -> str | None:
        """The student's adapter, None for the teacher. Raises UserError if the options contradict one another."""
        of_student = {
            "--adapter": self.adapter is not None,
            "--raw": self.raw,
            "--adapter-scale": self.adapter_scale != 1,
            "--merge" if self.merge else "--no-merge": self.merge is not None,
        }
        if self.teacher and (given := [name for name, is_given in of_student.items() if is_given]):
            raise UserError(f"--teacher samples without a student: leave {given[0]} out")
        return None if self.teacher else which_student(self.model, self.adapter, ", or say --teacher for the teacher")

    def load(self, mesh: Mesh | None = None) -> ArcFlowPipeline:
        """The pipeline, by default on the mesh that --mesh names; a PyTorch model is converted first.

        Raises UserError.
        """
        import jax

        from arcflow_jax.models.model_cache import converted
        from arcflow_jax.models.style_loras import split_scale
        from arcflow_jax.pipeline import ArcFlowPipeline
        from arcflow_jax.storage import cache

        cache.enable_compilation_cache()
        adapter, offload = self.adapter_or_teacher(), self.offload
        if offload is not None and jax.default_backend() == "cpu":
            print(
                f"warning: --offload {offload.value} has no effect: a CPU has no memory but the host's", file=sys.stderr
            )
            offload = None
        model = converted(self.model)  # which has a progress bar of its own
        with progress_bar() as progress:
            progress("loading", 0, None)
            pipeline = ArcFlowPipeline.from_pretrained(
                model,
                adapter,
                mesh=self.mesh if mesh is None else mesh,
                offload=None if offload is None else offload.value,
                raw=self.raw,
                merge=self.merge,
                adapter_scale=self.adapter_scale,
                compute=None if self.compute is None else self.compute.value,
                vae_tiling=self.vae_tiling,
            )
            for text in self.lora or ():
                source, scale = split_scale(text)
                pipeline.load_lora_weights(source, scale=scale)
            return pipeline


@dataclasses.dataclass(frozen=True)
class SamplingOptions(StudentOptions, LoadingOptions):
    """Everything that images are made with, apart from prompts and noise."""

    steps: Annotated[
        int | None, typer.Option(help="NFE. By default what the student was trained for, 50 for the teacher.")
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale. By default what the student was trained at, 3.5 for the teacher."),
    ] = None
    final_step_ratio: Annotated[
        float | None,
        typer.Option(help="Length of the student's last segment relative to the others. By default as trained."),
    ] = None
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            help='With --teacher: classifier-free guidance (CFG) away from this prompt, which may be "" as for '
            "FLUX.2 and Qwen-Image. --guidance is then the scale of CFG, by default 4."
        ),
    ] = None

    def load(self, mesh: Mesh | None = None) -> ArcFlowPipeline:
        """As for any model; settings that fit no model are refused before it is loaded."""
        from arcflow_jax.sampling_settings import RANGES, check_ranges

        check_ranges(**{name: value for name, value in self.settings().items() if name in RANGES})
        return super().load(mesh)

    def settings(self) -> dict[str, Any]:
        """The arguments of `ArcFlowPipeline.settings`."""
        return {
            "num_inference_steps": self.steps,
            "seed": self.seed,
            "guidance_scale": self.guidance,
            "height": self.height,
            "width": self.width,
            "final_step_ratio": self.final_step_ratio,
            "negative_prompt": self.negative_prompt,
            "norm_preserving": self.norm_preserving,
        }


def which_student(model: Path, adapter: str | None, otherwise: str = "") -> str:
    """The adapter that is meant, by default the demo's. Raises UserError if none is named for another model, or there
    is no demo."""
    if adapter is not None:
        return adapter
    if model != DEMO / "teacher":
        raise UserError(f"name the student with --adapter{otherwise}")
    if not model.exists():
        raise UserError(f"there is no demo in {DEMO}: run arcflow demo first, or name --model and --adapter")
    return str(DEMO / "arcflow")


@contextlib.contextmanager
def progress_bar() -> Generator[Callable[[str, int, int | None], None]]:
    """A bar on stderr, if that is a terminal; call it with the activity, how many images are done, and of how many."""
    from arcflow_jax import console
    from arcflow_jax.parallel.processes import is_main

    with console.progress_bar(transient=True, disable=not is_main()) as bar:
        task = bar.add_task("starting", total=None, text="")
        yield lambda activity, done, total: bar.update(task, description=activity, completed=done, total=total)
