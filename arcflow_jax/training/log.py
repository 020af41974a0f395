"""Where a run says how it goes: console, log.jsonl, TensorBoard and, if asked for, Weights & Biases.

RUN/log.jsonl       a JSON object a line: what `train_step` logs, the time, iterations a second, device memory
RUN/tensorboard/    the same, and the pictures
RUN/previews/       pictures, STEP.png
RUN/wandb.json      the id under which Weights & Biases knows the run

A run that goes on from a checkpoint first forgets what was logged after it, since those iterations are done again.
Of several processes the first one logs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from arcflow_jax.data.output import save_image
from arcflow_jax.errors import UserError
from arcflow_jax.storage.atomic import make_directory
from arcflow_jax.storage.files import read_json, write_json
from arcflow_jax.training.recipe import Recipe

LOG = "log.jsonl"


class RunLog:
    """The log of a run that goes on after `done` iterations.

    Raises UserError, here and in every method, if something cannot be written.
    """

    def __init__(self, run: Path, recipe: Recipe, done: int):
        self.run, self.recipe = run, recipe
        self.writes = jax.process_index() == 0
        self.last = (done, time.monotonic())  # iteration and time of the last line
        self.progress = progress_bar(disable=not self.writes)
        self.task = self.progress.add_task("distilling", total=recipe.steps, completed=done, text="")
        if not self.writes:
            return
        with self._writing():
            forget_after(run / LOG, done)
            self.lines = open(run / LOG, "a")  # noqa: SIM115
            folder = run / "tensorboard"
            folder.mkdir(exist_ok=True)
            # Not SummaryWriter, whose thread would die of a full disk unseen
            self.tensorboard = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.0f}.{done}"))
            self._event(file_version="brain.Event:2")
            # Tells TensorBoard to forget later iterations
            self._event(step=done + 1, session_log=SessionLog(status=SessionLog.START))
        self.wandb = start_wandb(run, recipe) if recipe.wandb_project else None

    def __enter__(self) -> RunLog:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.progress.stop()
        if not self.writes:
            return
        for file in (self.lines, self.tensorboard):
            with self._writing() if kind is None else contextlib.suppress(OSError):
                file.close()
        if self.wandb is not None:
            self.wandb.finish()

    def say(self, text: str) -> None:
        """A line on the console."""
        if self.writes:
            self.progress.console.print(text, highlight=False, soft_wrap=True)

    def iteration(self, step: int, values: dict[str, jax.Array]) -> dict[str, Any]:
        """Logs what iteration `step`, counted from 1, returned, and returns the line. This waits for the device."""
        line = {"step": step, "time": time.time(), **{name: np.asarray(x).tolist() for name, x in values.items()}}
        before, then = self.last
        self.last = (step, time.monotonic())
        rate = (step - before) / (self.last[1] - then)
        line |= {"iterations_per_second": rate, "device_memory": device_memory()}
        if not self.writes:
            return line
        text = f"{in_words(line)}, {rate:.3g} it/s, {left(self.recipe.steps - step, rate)} left"
        self.progress.update(self.task, completed=step, text=text)
        scalars = flat(line)
        with self._writing():
            if not self.progress.console.is_terminal:  # where no bar can move: a log file, CI
                print(f"iteration {step} of {self.recipe.steps}: {text}", flush=True)
            self.lines.write(json.dumps(finite(line)) + "\n")
            self.lines.flush()
            for name, value in scalars.items():
                self._event(step=step, summary=summary.scalar(name, value))
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log(scalars, step=step)
        return line

    def picture(self, step: int, image: Image.Image) -> None:
        """Keeps a picture of iteration `step`."""
        if not self.writes:
            return
        make_directory(self.run / "previews")
        save_image(image, self.run / "previews" / f"{step:06d}.png")
        with self._writing():
            self._event(step=step, summary=summary.image("preview", np.asarray(image), dataformats="HWC"))
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log({"preview": importlib.import_module("wandb").Image(image)}, step=step)

    def _event(self, **values: Any) -> None:
        self.tensorboard.write(Event(wall_time=time.time(), **values).SerializeToString())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write to {self.run}, its checkpoints are intact: {error.strerror}") from error


def progress_bar(disable: bool) -> Progress:
    """Bar, iterations, time spent, and the latest figures."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
        disable=disable,
    )


def forget_after(path: Path, step: int) -> None:
    """Takes the lines of later iterations out of a log, and one that was not written to its end."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(kept))
    os.replace(aside, path)


def start_wandb(run: Path, recipe: Recipe) -> Any:
    """The run in Weights & Biases, which goes on there as it does here."""
    wandb = importlib.import_module("wandb")
    known = run / "wandb.json"
    if not known.exists():
        write_json(known, {"id": uuid.uuid4().hex[:8]})
    return wandb.init(
        project=recipe.wandb_project,
        name=run.name,
        id=read_json(known)["id"],
        resume="allow",
        dir=str(run),
        config=recipe.resolved(),
    )


def device_memory() -> int | None:
    """The most bytes that one of this process's devices has had in use; None where the backend does not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return max(peaks, default=None)


def in_words(line: dict[str, Any]) -> str:
    """A line for people: loss, that of each segment, and how the run stands."""
    segments = " ".join(f"{loss:.4f}" for loss in line["segment_loss"])
    parts = [
        f"loss {line['loss']:.4f} (segments {segments})",
        f"gradient {line['gradient_norm']:.3g}",
        f"rate {line['learning_rate']:.2g}",
        f"teacher {100 * line['teacher_share']:.0f} %",
        *([f"{line['skipped']} skipped"] if line["skipped"] else []),
        *([f"{line['device_memory'] / 2**30:.2f} GiB"] if line["device_memory"] is not None else []),
    ]
    return ", ".join(parts)


def left(iterations: int, rate: float) -> str:
    """The time that so many iterations take, h:mm:ss."""
    minutes, seconds = divmod(round(iterations / rate), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def flat(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line, those of the segments each under a name of its own."""
    scalars = {}
    for name, value in line.items():
        if isinstance(value, list):
            scalars |= {f"{name}/{i}": x for i, x in enumerate(value)}
        elif name not in ("step", "time") and value is not None:
            scalars[name] = value
    return scalars


def finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
