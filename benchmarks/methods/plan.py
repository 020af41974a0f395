"""What is still to do: pure functions of the results so far."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.methods import search
from benchmarks.methods.protocol import FIRST, METHODS, SCHEDULES, SEEDS, SHARE, Cell, Scope, Setting, has_grid, parent
from benchmarks.methods.results import Part, Result, errors

AROUND = 5  # neighbours that a search usually trains with the whole budget


def start(results: Sequence[Result], cell: Cell, scope: Scope) -> list[Setting] | None:
    """The settings that a cell's search begins with; None if they are not known yet."""
    before = parent(cell, scope)
    if before is None:
        return search.grid() if scope.start is None else [scope.start]
    known = errors(results, before)
    return [search.best(known)[0]] if search.whole(known) else None


def parts(cell: Cell, scope: Scope) -> list[Part]:
    """What is measured of a cell on the test prompts."""
    as_published = (cell.nfe, cell.shift) == scope.published and not SHARE.items() <= METHODS[cell.method].items()
    return ["best", "published"] if as_published else ["best"]


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
    begin, known = start(results, cell, scope), errors(results, cell)
    if begin is not None and not search.missing(known, begin):
        return 0.0
    count = len(search.grid()) if has_grid(cell, scope) else 1
    third = -(-count // 3)
    expected = third + (count - third) * FIRST + AROUND if count > 1 else 1 + AROUND
    return max(1.0, expected - used(results, cell, "search"))


def runs_left(results: Sequence[Result], cells: Sequence[Cell], scope: Scope) -> float:
    """About how many whole budgets these cells will use yet."""
    tests = sum(len(SEEDS) - used(results, cell, part) for cell in cells for part in parts(cell, scope))
    first = [cell for cell in cells if has_grid(cell, scope)]
    tests += sum(len(SCHEDULES) - used(results, cell, "schedules") for cell in first)
    return tests + sum(search_left(results, cell, scope) for cell in cells)
