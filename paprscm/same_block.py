# SPDX-License-Identifier: GPL-2.0-or-later
"""Writers of one block that are moved between CPUs: their report, and how a wedged CPU looks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from paprscm.errors import ContractError, HostError
from paprscm.map_sync_report import ProbeError
from paprscm.strict_json import MalformedError, load_line

PROGRESS = re.compile(r"same_block: (\d+) writes$")
DONE = re.compile(r"same_block: done$")
"""The lines that it writes to the console."""


@dataclass(frozen=True, kw_only=True)
class SameBlock:
    """What guest_tools/same_block.c reports.

    Attributes:
        writes: of each thread.
        moves: how often a thread was given another CPU.
        duration_ns: of the whole.
        errno: of the first write that failed, or 0.
        whole: the block is one thread's, all of it.
    """

    writes: tuple[int, ...]
    moves: int
    duration_ns: int
    errno: int
    whole: bool


def parse_same_block(stdout: str) -> SameBlock:
    """Parse the report.

    Raises:
        ProbeError: it cannot be believed.
    """
    try:
        fields = load_line(stdout)
        fields.require(fields.take("tool", str) == "same_block", "it is another tool's")
        fields.require(fields.take("version", int) == 1, "it is of another version")
        threads, writes = fields.take("threads", int), fields.take("writes", list)
        fields.require(
            len(writes) == threads and all(type(n) is int and n >= 0 for n in writes),
            f"writes is {writes}",
        )
        report = SameBlock(
            writes=tuple(writes),
            moves=fields.take("moves", int),
            duration_ns=fields.take("duration_ns", int),
            errno=fields.take("errno", int),
            whole=fields.take("whole", bool),
        )
        fields.done()
    except MalformedError as error:
        raise ProbeError(
            f"the report of same_block cannot be believed: {error}: {stdout[:500]!r}"
        ) from error
    return report


def expect_written(report: SameBlock) -> None:
    """Assert that all threads wrote, and that the block is one thread's.

    Raises:
        ContractError: a write failed, or the block is of two of them.
        HostError: a thread never wrote, or none was moved: nothing was tried.
    """
    if report.errno or not report.whole:
        state = "whole" if report.whole else "torn"
        raise ContractError(f"the block is {state}, the first error is errno {report.errno}")
    if not all(report.writes) or not report.moves:
        raise HostError(f"not every thread wrote and was moved: {report}")


def traces(lines: Sequence[str], message: re.Pattern[str], *, length: int = 60) -> list[str]:
    """The call traces that follow a kernel message, each with its first line.

    Args:
        lines: of the console.
        message: what the first line of a trace holds.
        length: how many lines belong to it, up to the next such message.
    """
    begins = [number for number, line in enumerate(lines) if message.search(line)]
    ends = [*begins[1:], len(lines)]
    return [
        "\n".join(lines[begin : min(end, begin + length)])
        for begin, end in zip(begins, ends, strict=False)
    ]
