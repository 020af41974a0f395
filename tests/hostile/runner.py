"""Runs many cases, in one process or in several that are watched, and prints what came out."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.hostile import case as cases
from tests.hostile.case import GOOD, OUTCOMES, Ending

GRACE = 3 * cases.SECONDS  # seconds after which a process is killed that does not react to its own alarm


@dataclasses.dataclass(frozen=True)
class Result:
    """How the case of one family and seed ended."""

    family: str
    seed: int
    ending: Ending
    what: str
    seconds: float

    @property
    def bad(self) -> bool:
        return self.ending.outcome not in GOOD


def plan(families: Sequence[str], count: int, seed: int) -> list[tuple[str, int]]:
    """(family, seed) of so many cases, spread over the families by their weights."""
    from tests.hostile.families import FAMILIES

    weights = {name: FAMILIES[name][1] for name in families}
    total = sum(weights.values())
    numbers = {name: max(1, round(count * weight / total)) for name, weight in weights.items()}
    return [(name, seed + i) for name, number in numbers.items() for i in range(number)]


def run_one(family: str, seed: int) -> Result:
    """Makes a case in a new folder, runs it, and removes the folder."""
    from tests.hostile.families import FAMILIES

    make = FAMILIES[family][0]
    folder = Path(tempfile.mkdtemp(prefix="case-", dir=os.environ.get("HOSTILE_FOLDER")))
    try:
        try:
            made = make(random.Random(f"{family} {seed}"), folder)
        except Exception as error:
            text = f"the case cannot be made: {type(error).__name__}: {error} in {traceback.format_exc()[-300:]}"
            return Result(family, seed, Ending("traceback", text, "the harness"), "", 0.0)
        begin = time.perf_counter()
        ending = cases.run(made)
        return Result(family, seed, ending, made.what, time.perf_counter() - begin)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def child(pipe: Any) -> None:
    """A worker process: runs the cases that arrive on the pipe."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with contextlib.suppress(EOFError):
        while (job := pipe.recv()) is not None:
            pipe.send(run_one(*job))


class Worker:
    """A process of its own; a case that ends it, or that does not end, is a hang or a crash."""

    def __init__(self, context: Any):
        self.context, self.job, self.since = context, None, 0.0
        self.start()

    def start(self) -> None:
        self.pipe, other = self.context.Pipe()
        self.process = self.context.Process(target=child, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.fresh = True

    def give(self, job: tuple[str, int]) -> None:
        self.job, self.since = job, time.monotonic()
        self.pipe.send(job)

    def take(self) -> Result | None:
        """The result of the case, if there is one by now."""
        late = time.monotonic() - self.since > GRACE + 120 * self.fresh
        with contextlib.suppress(EOFError, ConnectionResetError):
            if self.pipe.poll(0):
                result, self.job, self.fresh = self.pipe.recv(), None, False
                return result
            if self.process.is_alive() and not late:
                return None
        assert self.job is not None
        family, seed = self.job
        self.process.join(0 if late else 5)
        alive = self.process.is_alive()
        self.process.kill()
        self.process.join()
        why = "killed: it did not react" if alive else f"the process died with code {self.process.exitcode}"
        self.job = None
        self.start()
        return Result(family, seed, Ending("hang" if alive else "traceback", why, why), "", GRACE)


def run_all(jobs: Sequence[tuple[str, int]], processes: int) -> Iterator[Result]:
    """Runs cases in so many processes."""
    context = multiprocessing.get_context("spawn")
    workers = [Worker(context) for _ in range(processes)]
    waiting = collections.deque(jobs)
    left = len(jobs)
    while left:
        for worker in workers:
            if worker.job is not None and (result := worker.take()) is not None:
                left -= 1
                yield result
            if worker.job is None and waiting:
                worker.give(waiting.popleft())
        time.sleep(0.002)
    for worker in workers:
        worker.pipe.send(None)
        worker.process.join(10)


def table(results: Iterable[Result]) -> str:
    """Families and outcomes, in Markdown."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for result in results:
        for name in (result.family, "all"):
            counts[name][result.ending.outcome] += 1
    lines = [f"| family | cases | {' | '.join(OUTCOMES)} |", f"| --- |{' ---: |' * (1 + len(OUTCOMES))}"]
    for name in [*sorted(counts.keys() - {"all"}), "all"]:
        numbers = [sum(counts[name].values()), *(counts[name][outcome] for outcome in OUTCOMES)]
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def causes(results: Iterable[Result], shown: int = 3) -> str:
    """The bad cases by cause, the most frequent first, with the seeds of some."""
    groups: dict[tuple[str, str, str], list[Result]] = collections.defaultdict(list)
    for result in results:
        if result.bad:
            groups[result.family, result.ending.outcome, result.ending.cause].append(result)
    lines = []
    for (family, outcome, cause), group in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        lines.append(f"{len(group):5d}  {family}  {outcome}: {cause}")
        for result in group[:shown]:
            detail = result.ending.detail.replace("\n", "\n           ")
            lines.append(
                f"         --family {family} --seed {result.seed} --count 1   {result.what}\n           {detail}"
            )
    return "\n".join(lines)
