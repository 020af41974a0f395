"""What is still to do: pure functions of the results so far."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.methods import search
from benchmarks.methods.protocol import (
    FIRST,
    SCHEDULES,
    SEEDS,
    STOPS,
    Cell,
    Scope,
    Setting,
    has_grid,
    has_schedules,
    parent,
)
from benchmarks.methods.results import Part, Result, errors

AROUND = 5  # neighbours of a setting, about


def start(results: Sequence[Result], cell: Cell, scope: Scope) -> list[Setting] | None:
    """The settings that a cell's search begins with; None if they are not known yet."""
    if has_grid(cell, scope):
        return search.grid()
    good = scope.start
    if (before := parent(cell, scope)) is not None:
        known = errors(results, before)
        good = search.best(known)[0] if search.whole(known) else None
    return None if good is None else [good, *search.neighbours(good)]


def missing(results: Sequence[Result], cell: Cell, scope: Scope) -> list[tuple[Setting, float]] | None:
    """What the search of a cell has to train next, see `search.missing`; None if that is not known yet."""
    begin = start(results, cell, scope)
    return None if begin is None else search.missing(errors(results, cell), begin, further=has_grid(cell, scope))


def parts(cell: Cell, scope: Scope) -> list[Part]:
    """What is measured of a cell on the test prompts."""
    return ["best", "published"] if cell in scope.published else ["best"]


def stops(part: Part, cell: Cell, scope: Scope, until: float) -> list[float]:
    """The parts of the budget after which a run that ends at `until` is measured.

    At all stops, a student is measured on the test prompts only at the first NFE and shift, because that takes long.
    """
    every = part in ("search", "schedules") or (part == "best" and cell.place == scope.first)
    return [stop for stop in STOPS if stop <= until] if every else [until]


def end(results: Sequence[Result], part: Part, cell: Cell, scope: Scope) -> float:
    """The part of the budget that a run on the test prompts gets: all, or up to the stop that the search chose."""
    if part == "best" and cell.place != scope.first and search.whole(known := errors(results, cell)):
        return search.best(known)[1]
    return 1.0


def used(results: Sequence[Result], cell: Cell, part: Part) -> float:
    """How many whole budgets a part of a cell has used so far."""
    shares: dict[tuple[Setting | None, int], float] = {}
    for result in results:
        if (result.cell, result.part) == (cell, part):
            run = result.setting, result.seed
            shares[run] = max(shares.get(run, 0.0), result.share)
    return sum(shares.values())


def search_left(results: Sequence[Result], cell: Cell, scope: Scope) -> float:
    """About how many whole budgets the search of a cell will use yet."""
    if missing(results, cell, scope) == []:
        return 0.0
    count, further = (len(search.grid()), AROUND) if has_grid(cell, scope) else (AROUND + 1, 0)
    third = -(-count // 3)
    return max(1.0, third + (count - third) * FIRST + further - used(results, cell, "search"))


def runs_left(results: Sequence[Result], cells: Sequence[Cell], scope: Scope) -> float:
    """About how many whole budgets these cells will use yet."""
    tests = sum(
        len(SEEDS) * end(results, part, cell, scope) - used(results, cell, part)
        for cell in cells
        for part in parts(cell, scope)
    )
    tests += sum(len(SCHEDULES) - used(results, cell, "schedules") for cell in cells if has_schedules(cell, scope))
    return tests + sum(search_left(results, cell, scope) for cell in cells)
