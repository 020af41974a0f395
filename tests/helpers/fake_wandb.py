"""Weights & Biases without its service."""

from __future__ import annotations

import fnmatch
import types


class FakeWandb(types.ModuleType):
    """What the run calls of Weights & Biases, which is not installed where tests run, as its documentation has it.

    A run is known by its id. Its own step counts up, in a resumed run too; what is logged to an earlier one is dropped.
    A metric is drawn over that step, or over another metric of the same call, as `define_metric` says.
    """

    def __init__(self):
        super().__init__("wandb")
        self.runs: dict[str, FakeWandb.Run] = {}
        self.__spec__ = types.SimpleNamespace()
        self.Image = lambda image: image.size

    def init(self, *, project: str, name: str, id: str, resume: str, dir: str, config: dict) -> FakeWandb.Run:
        assert resume == "allow"
        run = self.runs.setdefault(id, FakeWandb.Run())
        run.open = True
        return run

    class Run:
        def __init__(self):
            self.open, self.own_step, self.x = False, 0, {}
            self.drawn: list[tuple[str, int, object]] = []  # metric, where, value
            self.summary: dict[str, object] = {}  # the last value of each

        def define_metric(self, name: str, *, step_metric: str) -> None:
            self.x[name] = step_metric

        def log(self, data: dict, step: int | None = None) -> None:
            assert self.open, "log after finish"
            if step is not None and step < self.own_step:
                return  # dropped, with a warning
            self.own_step = self.own_step + 1 if step is None else step
            self.summary |= data
            for name, value in data.items():
                over = next((x for pattern, x in self.x.items() if fnmatch.fnmatchcase(name, pattern)), None)
                if over is None or over in data:
                    self.drawn.append((name, self.own_step if over is None else data[over], value))

        def finish(self) -> None:
            self.open = False

        def steps(self, name: str) -> list[int]:
            return [step for metric, step, _ in self.drawn if metric == name]
