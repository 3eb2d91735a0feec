# SPDX-License-Identifier: GPL-2.0-or-later
"""Small programs by construction: each operation, followed by each call that makes it durable.

Most crash bugs of file systems need one or two operations on a new file system (Mohan et al.,
"Finding Crash-Consistency Bugs with Bounded Black-Box Crash Testing", OSDI 2018).
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

from paprscm.power_cut.steps import Program, Step

KIB = 1024

BEFORE = (
    Step("create", "a"),
    Step("write", "a", length=128 * KIB, byte=1),
    Step("mkdir", "d"),
    Step("create", "d/b"),
    Step("write", "d/b", length=64 * KIB, byte=2),
)
"""Files of each program's folder; they are durable before the program begins."""

OPERATIONS: dict[str, Sequence[Step]] = {
    "overwrite": [Step("write", "a", offset=4 * KIB, length=8 * KIB)],
    "append": [Step("write", "a", offset=128 * KIB, length=16 * KIB)],
    "write beyond a hole": [Step("write", "a", offset=256 * KIB, length=4 * KIB)],
    "write with O_DSYNC": [Step("dwrite", "a", offset=64 * KIB, length=4 * KIB)],
    "append with O_DSYNC": [Step("dwrite", "a", offset=128 * KIB, length=4 * KIB)],
    "store": [Step("store", "a", offset=16 * KIB, length=4 * KIB)],
    "shorten": [Step("truncate", "a", length=32 * KIB)],
    "lengthen": [Step("truncate", "a", length=192 * KIB)],
    "shorten and append": [
        Step("truncate", "a", length=64 * KIB),
        Step("write", "a", offset=64 * KIB, length=8 * KIB),
    ],
    "create": [Step("create", "c")],
    "create and write": [Step("create", "c"), Step("write", "c", length=12 * KIB)],
    "rename": [Step("rename", "a", "c")],
    "rename over": [Step("rename", "a", "d/b")],
    "rename out of a folder": [Step("rename", "d/b", "c")],
    "write, rename over": [
        Step("create", "c"),
        Step("write", "c", length=64 * KIB),
        Step("fsync", "c"),
        Step("rename", "c", "a"),
    ],
    "link": [Step("link", "a", "d/c")],
    "unlink": [Step("unlink", "a")],
    "link and unlink": [Step("link", "a", "c"), Step("unlink", "a")],
    "unlink and create": [Step("unlink", "a"), Step("create", "a")],
    "mkdir": [Step("mkdir", "e")],
    "mkdir and create": [
        Step("mkdir", "e"),
        Step("create", "e/f"),
        Step("write", "e/f", length=4 * KIB),
    ],
    "rmdir": [Step("unlink", "d/b"), Step("rmdir", "d")],
}
"""Operations by name; each write gets a byte of its own."""


def durable(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Yield calls that make the effect of steps durable, or a part of it, in different ways."""
    names = {name for step in steps for name in (step.name, step.other) if name}
    there = _files_after(steps)
    folders = {name.rpartition("/")[0] or "." for name in names}
    ways = [
        [Step("fsync", name) for name in sorted(names & there)],
        [Step("fsync", folder) for folder in sorted(folders & {*there, "."})],
        [Step("fdatasync", name) for name in sorted(names & there)],
        [Step("msync", step.name, offset=step.offset, length=step.length) for step in steps[-1:]
         if step.verb in ("write", "store")],
        [Step("syncfs", ".")],
        [Step("sync", ".")],
    ]  # fmt: skip
    yield from (way for way in ways if way)
    yield [*ways[0], *ways[1]]


def _files_after(steps: Sequence[Step]) -> set[str]:
    there = {step.name for step in BEFORE}
    for step in steps:
        if step.verb in ("create", "mkdir"):
            there.add(step.name)
        elif step.verb in ("unlink", "rmdir", "rename"):
            there.discard(step.name)
        there |= {step.other} if step.other else set()
    return there


def programs(dice: random.Random, count: int) -> Iterator[list[Step]]:
    """Programs of one operation in all ways, in random order, then of two operations.

    Args:
        dice: source of the order, and of the pairs.
        count: number of programs.
    """
    singles = [[*steps, *way] for steps in OPERATIONS.values() for way in durable(steps)]
    dice.shuffle(singles)
    bytes_of_writes = itertools.cycle(range(3, 256))
    for steps in itertools.islice(itertools.chain(singles, _pairs(dice)), count):
        yield [_with_byte(step, bytes_of_writes) for step in steps]


def _pairs(dice: random.Random) -> Iterator[list[Step]]:
    while True:
        first, second = dice.choices(list(OPERATIONS.values()), k=2)
        one, two = (dice.choice(list(durable(steps))) for steps in (first, second))
        steps = [*first, *one, *second, *two]
        if _is_possible(steps):
            yield steps


def _is_possible(steps: Sequence[Step]) -> bool:
    try:
        Program([*BEFORE, *steps]).expected(len(BEFORE) + len(steps))
    except ValueError:
        return False
    return True


def _with_byte(step: Step, values: Iterator[int]) -> Step:
    if step.verb in ("write", "dwrite", "store"):
        return dataclasses.replace(step, byte=next(values))
    return step
