"""Where a run reports: console, log.jsonl, TensorBoard and, if asked for, Weights & Biases.

RUN/log.jsonl       a JSON object a line: what `train_step` logs, the time, training steps and examples a
                    second, the share of that time in which the loop waited for data (data_wait), TFLOP a second of a
                    device and their share of its peak (MFU), device memory
RUN/tensorboard/    the same, and the images
RUN/previews/       images, STEP.png
RUN/wandb.json      the run's id in Weights & Biases
RUN/error-N.log     the traceback of the error that ended process N last

A run that resumes from a checkpoint first deletes what was logged after it, because those training steps run again.
Only the first process logs, but for errors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from msgspec import Meta
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from arcflow_jax import schema
from arcflow_jax.console import duration, optional, progress_bar
from arcflow_jax.data.output import png, save_image
from arcflow_jax.errors import Preempted, UserError, of_files
from arcflow_jax.parallel.processes import is_main
from arcflow_jax.schema import TrainingSteps
from arcflow_jax.storage.atomic import append, make_directory, upload, write_file
from arcflow_jax.storage.files import json_records, parse_json, read_lines
from arcflow_jax.training.recipe import SETTINGS, Recipe
from arcflow_jax.training.report.wandb import WandbLog
from arcflow_jax.training.work import speed

LOG = "log.jsonl"


@dataclasses.dataclass(frozen=True)
class Line:
    """What is read of a line of log.jsonl. The loss of a skipped training step is None."""

    step: TrainingSteps
    loss: Annotated[float, Meta(ge=-1e38, le=1e38)] | None = None


class RunLog:
    """The log of a run that has done `done` training steps.

    Raises UserError, here and in every method, if something cannot be written.
    """

    def __init__(self, run: Path, recipe: Recipe, done: int):
        self.run, self.recipe = run, recipe
        self.writes = is_main()
        self.last = (done, time.monotonic(), 0.0)  # of the last line: training step, time, and time waited for data
        self.flops = 0  # operations since then, which the loop adds
        self.progress = progress_bar(disable=not self.writes)
        self.task = self.progress.add_task("distilling", total=recipe.steps, completed=done, text="")
        if not self.writes:
            return
        with self._writing():
            forget_after(run / LOG, done)
            self.lines = append(run / LOG)
            (run / "tensorboard").mkdir(exist_ok=True)
            # TensorBoard takes files with this word in their name. Its own EventFileWriter writes in a thread, which a
            # full disk ends unseen
            name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{done}"
            self.tensorboard = RecordWriter(append(run / "tensorboard" / name).detach())
            self._event(file_version="brain.Event:2")
            # Tells TensorBoard to forget later training steps
            self._event(step=done + 1, session_log=SessionLog(status=SessionLog.START))
            before = [
                {"step": line["step"], **flat(line)}
                for _, line in (json_records(run / LOG) if recipe.wandb_project else ())
            ]
        self.wandb = WandbLog(run, recipe, before) if recipe.wandb_project else None

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
            print(text, flush=True)

    def step(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Logs what training step `step`, counted from 1, returned. Returns the line. This waits for the device.

        Args:
          values: arrays and numbers by name. `waited`, the seconds that the loop has waited for data so far, becomes
            `data_wait`.
        """
        line = {"step": step, "time": time.time(), **{name: np.asarray(x).tolist() for name, x in values.items()}}
        waited = line.pop("waited", 0.0)
        before, then, waited_then = self.last
        self.last = (step, time.monotonic(), waited)
        seconds = self.last[1] - then
        rate = (step - before) / seconds
        line |= {
            "steps_per_second": rate,
            "examples_per_second": rate * self.recipe.batch,
            "data_wait": (waited - waited_then) / seconds,
            **speed(self.flops / seconds),
            "device_memory": device_memory(),
        }
        self.flops = 0
        if not self.writes:
            return line
        text = f"{in_words(line)}, {rate:.3g} steps/s, {line['tflops_per_device']:.3g} TFLOP/s a device"
        text += "" if line["mfu"] is None else f" (MFU {100 * line['mfu']:.0f} %)"
        self.progress.update(self.task, completed=step, text=text)
        scalars = flat(line)
        with self._writing():
            if self.progress.disable:  # a log file, CI
                left = duration((self.recipe.steps - step) / rate)
                print(f"step {step} of {self.recipe.steps}: {text}, {left} left", flush=True)
            self.lines.write(json.dumps(finite(line)) + "\n")
            self.lines.flush()
            for name, value in scalars.items():
                self._event(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log({"step": step, **scalars})
        return line

    def upload(self) -> None:
        """Uploads the lines so far, if the run is in a bucket."""
        if self.writes:
            with self._writing():
                upload(self.lines)

    def image(self, step: int, image: Image.Image) -> None:
        """Keeps an image drawn after training step `step`."""
        if not self.writes:
            return
        with optional("the preview was not saved"):
            make_directory(self.run / "previews")
            save_image(image, self.run / "previews" / f"{step:06d}.png")
            drawn = Summary.Image(width=image.width, height=image.height, encoded_image_string=png(image))
            self._event(step=step, summary=Summary(value=[Summary.Value(tag="preview", image=drawn)]))
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.image(step, image)

    def _event(self, **values: Any) -> None:
        self.tensorboard.write(Event(wall_time=time.time(), **values).SerializeToString())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise of_files(f"cannot write to {self.run}, its checkpoints are intact", error) from error


@contextlib.contextmanager
def traceback_in(run: Path) -> Iterator[None]:
    """Writes the traceback of an error in the `with` block that the user cannot correct to the run's directory."""
    try:
        yield
    except (UserError, Preempted):
        raise
    except Exception as error:
        if (run / SETTINGS).exists():
            where = f"{time.strftime('%Y-%m-%d %H:%M:%S')}, process {jax.process_index()} on {socket.gethostname()}"
            text = f"{where}\n{''.join(traceback.format_exception(error))}"
            with contextlib.suppress(OSError):
                write_file(run / f"error-{jax.process_index()}.log", text.encode())
        raise


def forget_after(path: Path, step: int) -> None:
    """Deletes the lines of later training steps from a log, and a last line that was cut off.

    Raises:
      UserError: if another line is damaged.
    """
    if not path.exists():
        return
    kept = []
    for where, line in read_lines(path):
        try:
            values = parse_json(line, where)
        except UserError:
            if not line.endswith(b"\n"):  # cut off
                break
            raise
        if schema.parse(Line, values, where).step <= step:
            kept.append(line.rstrip(b"\n") + b"\n")
    write_file(path, b"".join(kept))


def read_losses(path: Path) -> list[tuple[int, float]]:
    """(training step, loss) of each line of a log that has a finite loss: not of skipped steps. Raises UserError."""
    lines = [schema.parse(Line, record, where) for where, record in json_records(path)]
    return [(line.step, line.loss) for line in lines if line.loss is not None]


def device_memory() -> int | None:
    """Peak memory in bytes of the device of this process that used most; None where the backend does not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return max(peaks, default=None)


def in_words(line: dict[str, Any]) -> str:
    """A line for people: the loss, that of each segment, and the state of the run."""
    segments = " ".join(f"{loss:.4f}" for loss in line["segment_loss"])
    parts = [
        f"loss {line['loss']:.4f} (segments {segments})",
        f"gradient {line['gradient_norm']:.3g}",
        f"rate {line['learning_rate']:.2g}",
        f"teacher {100 * line['teacher_share']:.0f} %",
        *([f"{100 * line['data_wait']:.0f} % waiting for data"] if line["data_wait"] > 0.02 else []),
        *([f"{line['skipped']} skipped"] if line["skipped"] else []),
        *([f"{line['device_memory'] / 2**30:.2f} GiB"] if line["device_memory"] is not None else []),
    ]
    return ", ".join(parts)


def flat(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line, those of the segments as NAME/0, NAME/1, …."""
    scalars = {}
    for name, value in line.items():
        if isinstance(value, list):
            scalars |= {f"{name}/{i}": x for i, x in enumerate(value)}
        elif name not in ("step", "time") and value is not None:
            scalars[name] = value
    return scalars


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
