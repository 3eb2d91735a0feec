# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls in the guest that promise durability, made by guest_tools/flush.c, each with its times."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import Literal

from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.guest.report import (
    Fields,
    Natural,
    ProbeError,
    ToolReport,
    check_report,
    read_report,
)
from paprscm.guest.tools import compile_tool

DurableOperation = Literal[
    "deep_flush", "fsync", "fdatasync", "msync", "dsync", "direct_dsync", "syncfs", "mixed"
]

# More than the load's own limit: to start and to end.
_MORE_S = 60


class DurableCall(Fields, frozen=True, array_like=True):
    """One call that promises durability.

    Attributes:
        thread: which thread made it, from 0; it worked on the target of that number, modulo theirs.
        operation: the call; "dsync" is a write to a file opened with O_DSYNC.
        begin_ns: by the guest's CLOCK_MONOTONIC_RAW: what was stored before must be durable when
            it returns. For dsync and direct_dsync the data are stored by the call itself.
        end_ns: when it returned.
        errno: 0, or what it failed with.
    """

    thread: Natural
    operation: Literal[
        "deep_flush", "fsync", "fdatasync", "msync", "dsync", "direct_dsync", "syncfs"
    ]
    begin_ns: Natural
    end_ns: Natural
    errno: Natural

    def __post_init__(self) -> None:
        check_report(self.begin_ns <= self.end_ns, f"a call that ended before it began: {self}")

    @property
    def duration_s(self) -> float:
        """Duration of the call, s."""
        return (self.end_ns - self.begin_ns) / 1e9


class FlushLoadReport(ToolReport, frozen=True, kw_only=True):
    """Calls that threads in the guest made.

    Attributes:
        seed, threads: as asked for.
        targets: how many there were.
        duration_ns: from the moment at which all threads began to the end of the last, ns.
        calls: by thread, and of one thread in the order in which it made them.
    """

    tool: Literal["flush"]
    verb: Literal["load"]
    seed: Natural
    threads: Natural
    targets: Natural
    duration_ns: Natural
    calls: tuple[DurableCall, ...]

    def __post_init__(self) -> None:
        check_report(self.targets > 0, "no target")
        check_report(all(call.thread < self.threads for call in self.calls), "a thread too many")

    @property
    def duration_s(self) -> float:
        """The duration, s."""
        return self.duration_ns / 1e9

    def on(self, target: int) -> tuple[DurableCall, ...]:
        """The calls on the target of that number."""
        return tuple(call for call in self.calls if call.thread % self.targets == target)

    def expect_success(self) -> None:
        """Assert that no call failed."""
        failed = [call for call in self.calls if call.errno]
        if failed:
            first = failed[0]
            raise ContractError(
                f"{len(failed)} of {len(self.calls)} calls failed; the first, {first.operation} of "
                f"thread {first.thread}, with {os.strerror(first.errno)}"
            )


def run_flush_load(
    guest: Guest,
    operation: DurableOperation,
    targets: Sequence[str],
    *,
    threads: int = 1,
    count: int = 1,
    limit_s: int = 60,
    seed: int = 0,
) -> FlushLoadReport:
    """Make such calls from several threads at a time, in one round trip.

    Args:
        guest: where.
        operation: the call; "mixed" draws one each time, of those that fit the target.
        targets: a region's attribute for deep_flush; else a file system's folder, or a block
            device, whose content is lost.
        threads: how many; thread i works on target i, modulo their number.
        count: calls of each.
        limit_s: none is begun after so long, s.
        seed: of all that is drawn.

    Raises:
        ProbeError: the program does not build, or gave no report that can be believed.
    """
    words = [
        str(compile_tool(guest, "flush")),
        "load",
        f"--op={operation}",
        f"--threads={threads}",
        f"--count={count}",
        f"--limit={limit_s}",
        f"--seed={seed}",
        *targets,
    ]
    result = guest.run(shlex.join(words), timeout_s=limit_s + _MORE_S)
    report = read_report(FlushLoadReport, result.stdout, result.status, result.stderr)
    asked = (seed, threads, len(targets))
    told = (report.seed, report.threads, report.targets)
    if asked != told:
        raise ProbeError(f"flush answers {told}, it was asked for {asked}")
    if len(report.calls) > threads * count:
        raise ProbeError(f"flush made {len(report.calls)} calls, not {threads} times {count}")
    return report
