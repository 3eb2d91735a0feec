# SPDX-License-Identifier: GPL-2.0-or-later
"""Small programs by construction: each operation, followed by each call that makes it durable.

Most crash bugs of file systems need one or two operations on a new file system (Mohan et al.,
"Finding Crash-Consistency Bugs with Bounded Black-Box Crash Testing", OSDI 2018).
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

from paprscm.power_cut.steps import WRITES, Program, Step

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


def programs(dice: random.Random, count: int) -> Iterator[tuple[str, list[Step]]]:
    """Programs of one operation in all ways, in random order, then of two to four operations.

    Args:
        dice: source of the order, and of the longer ones.
        count: number of programs.

    Yields:
        The name of the operation, or the number of operations; and the steps.
    """
    singles = [
        (name, [*steps, *way]) for name, steps in OPERATIONS.items() for way in durable(steps)
    ]
    dice.shuffle(singles)
    bytes_of_writes = itertools.cycle(range(3, 256))
    for name, steps in itertools.islice(itertools.chain(singles, _longer(dice)), count):
        yield name, [with_byte(step, bytes_of_writes) for step in steps]


def _longer(dice: random.Random) -> Iterator[tuple[str, list[Step]]]:
    """Two operations, each with a call that makes it durable; sometimes three or four."""
    while True:
        operations = dice.choices(list(OPERATIONS.values()), k=dice.choice((2, 2, 2, 3, 4)))
        steps = [
            step
            for operation in operations
            for step in (*operation, *dice.choice(list(durable(operation))))
        ]
        if _is_possible(steps):
            yield f"{len(operations)} operations", steps


def _is_possible(steps: Sequence[Step]) -> bool:
    try:
        Program([*BEFORE, *steps]).expected(len(BEFORE) + len(steps))
    except ValueError:
        return False
    return True


def shortest(
    steps: Sequence[Step], fails: Callable[[Sequence[Step]], bool], *, tries: int
) -> list[Step]:
    """Leave out steps of a program as long as it fails.

    Args:
        steps: a program that fails.
        fails: runs a program, after `BEFORE`; returns whether it fails.
        tries: largest number of programs to run.

    Returns:
        A program that fails, and that fails no more without any one of its steps, unless `tries`
        programs were not enough.
    """
    found, at = list(steps), len(steps)
    while at:
        at -= 1
        shorter = [*found[:at], *found[at + 1 :]]
        if shorter and _is_possible(shorter) and tries:
            tries -= 1
            if fails(shorter):
                # The steps after this one may be of no use any more.
                found, at = shorter, len(shorter)
    return found


def with_byte(step: Step, values: Iterator[int]) -> Step:
    """Return a step with the next byte, if it writes any."""
    return dataclasses.replace(step, byte=next(values)) if step.verb in WRITES else step
