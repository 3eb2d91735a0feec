# SPDX-License-Identifier: GPL-2.0-or-later
"""The choice of cells: all, or so few that each pair (or triple) of values occurs in one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import covertable

from paprscm.errors import HostError
from paprscm.matrix.plan import Cell, Plan

Combination = frozenset[tuple[str, str]]
"""Values of some axes."""


def choose(plan: Plan, strength: int | None) -> list[Cell]:
    """Cells that cover a matrix, in the order of the plan's values; always the same ones.

    Args:
        plan: the matrix.
        strength: each possible combination of the values of so many axes is in a cell; None: all
            cells.

    Raises:
        HostError: a combination is missing, because of an error of the library.
    """
    if strength is None or strength >= len(plan.axes):
        return list(plan.cells())
    rows = covertable.make(
        {axis: list(values) for axis, values in plan.axes.items()},
        strength=strength,
        constraints=[_forbid(one.values) for one in plan.exclusions],
    )
    # With constraints, covertable 3.2 repeats rows.
    cells = list({cell.id: cell for cell in map(plan.cell, rows)}.values())
    wrong = [cell.id for cell in cells if plan.reason_against(cell.values) is not None]
    missing = coverable(plan, strength) - covered(cells, strength)
    if wrong or missing:
        some = sorted("-".join(value for _axis, value in sorted(one)) for one in missing)
        raise HostError(f"the choice of cells lacks {some[:3]}, and has {wrong[:3]}")
    ranks = {axis: list(values) for axis, values in plan.axes.items()}
    return sorted(cells, key=lambda cell: [ranks[a].index(v) for a, v in cell.values.items()])


def coverable(plan: Plan, strength: int) -> set[Combination]:
    """The combinations of values of `strength` axes that are in at least one cell."""
    return covered(plan.cells(), strength)


def covered(cells: Iterable[Cell], strength: int) -> set[Combination]:
    """The combinations of values of `strength` axes that are in these cells."""
    return {
        frozenset(some)
        for cell in cells
        for some in itertools.combinations(cell.values.items(), strength)
    }


def shard(
    cells: Sequence[Cell], number: int, count: int, durations: Mapping[str, float]
) -> list[Cell]:
    """The cells of one of several hosts: each cell is in one shard, and their times are similar.

    The longest cell first, to the shard that has the least so far. All hosts must use the same
    durations.

    Args:
        cells: all cells.
        number: 1 to `count`.
        count: number of shards.
        durations: durations of earlier runs, s, by id; an unknown cell takes their mean.
    """
    known = [durations[cell.id] for cell in cells if cell.id in durations]
    usual = sum(known) / len(known) if known else 1.0
    # The sort is stable: cells of the same duration stay in their order.
    ordered = sorted(cells, key=lambda cell: -durations.get(cell.id, usual))
    loads = [0.0] * count
    mine = []
    for cell in ordered:
        least = loads.index(min(loads))
        loads[least] += durations.get(cell.id, usual)
        if least == number - 1:
            mine.append(cell)
    return mine


def _forbid(values: Mapping[str, tuple[str, ...]]) -> dict[str, object]:
    """A condition of the library that a forbidden combination does not meet."""
    conditions = [
        {"operator": "in", "left": axis, "values": list(some)} for axis, some in values.items()
    ]
    return {"operator": "not", "condition": {"operator": "and", "conditions": conditions}}
