# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of the tests of power cuts, and how they are shortened."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from paprscm.power_cut.generate import BEFORE, OPERATIONS, durable, programs, shortest
from paprscm.power_cut.steps import Program, Step

CREATE, WRITE = Step("create", "c"), Step("write", "c", length=4096, byte=3)
SYNC, UNLINK, FSYNC = Step("sync", "."), Step("unlink", "a"), Step("fsync", "c")


def test_each_operation_is_made_durable_in_each_way_first() -> None:
    ways = sum(len(list(durable(steps))) for steps in OPERATIONS.values())
    named = list(programs(random.Random(1), ways + 200))  # noqa: S311 - repeatable
    made = [steps for _, steps in named]
    for steps in made:
        Program([*BEFORE, *steps]).expected(len(BEFORE) + len(steps))
    calls = ("fsync", "fdatasync", "msync", "sync", "syncfs")

    def operations(steps: Sequence[Step]) -> int:
        """Number of groups of calls; an operation may have an fsync of its own."""
        return sum(is_call for is_call, _ in itertools.groupby(steps, lambda s: s.verb in calls))

    assert max(map(operations, made[:ways])) <= 2
    assert max(map(operations, made[ways:])) >= 4
    assert {name for name, _ in named[:ways]} == set(OPERATIONS)
    assert {name for name, _ in named[ways:]} == {f"{count} operations" for count in (2, 3, 4)}


def test_a_program_is_shortened_to_the_steps_that_matter() -> None:
    tried: list[Sequence[Step]] = []

    def fails(steps: Sequence[Step]) -> bool:
        tried.append(steps)
        return WRITE in steps and FSYNC in steps

    found = shortest([SYNC, CREATE, WRITE, UNLINK, FSYNC, SYNC], fails, tries=100)
    # Without `create`, there would be no file to write to.
    assert found == [CREATE, WRITE, FSYNC]
    assert all(CREATE in steps or WRITE not in steps for steps in tried)


def test_a_program_stays_as_it_is_if_there_are_no_tries() -> None:
    steps = [CREATE, WRITE, FSYNC]
    assert shortest(steps, lambda _steps: True, tries=0) == steps
    assert len(shortest(steps, lambda _steps: True, tries=1)) == 2
