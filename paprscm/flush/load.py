# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls that promise durability, made in the guest by guest_tools/flush.c, with their times."""

from __future__ import annotations

import os
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
from paprscm.guest.tools import run_tool

DurableOperation = Literal[
    "deep_flush", "fsync", "fdatasync", "msync", "dsync", "direct_dsync", "syncfs", "mixed"
]

# Time in addition to the load's own limit, for its start and end.
_MARGIN_S = 60


class DurableCall(Fields, frozen=True, array_like=True):
    """One call that promises durability.

    Attributes:
        thread: number of its thread, from 0; modulo the number of targets, that of its target.
        operation: the call; "dsync" is a write to a file opened with O_DSYNC.
        begin_ns: start by the guest's CLOCK_MONOTONIC_RAW, ns: earlier stores must be durable when
            it returns. dsync and direct_dsync store the data themselves.
        end_ns: return by the same clock, ns.
        errno: errno of a failed call, or 0.
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
    """Calls of the threads in the guest.

    Attributes:
        seed, threads: as requested.
        targets: number of targets.
        duration_ns: from the common start of all threads to the end of the last, ns.
        calls: by thread, then in the order of the calls.
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
        check_report(
            all(call.thread < self.threads for call in self.calls), "a call of an unknown thread"
        )

    @property
    def duration_s(self) -> float:
        """Duration of the load, s."""
        return self.duration_ns / 1e9

    def on(self, target: int) -> tuple[DurableCall, ...]:
        """The calls on one target."""
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
    """Make calls from several threads concurrently, in one round trip.

    Args:
        guest: the guest.
        operation: the call; "mixed" chooses each at random among those that fit the target.
        targets: for deep_flush, the attribute of a region; else the folder of a file system, or a
            block device, whose content is lost.
        threads: number of threads; thread i works on target i modulo the number of targets.
        count: number of calls of each thread.
        limit_s: no call begins after this time, s.
        seed: seed of all random choices.

    Raises:
        ProbeError: the program does not compile, or its report is invalid.
    """
    words = [
        "load",
        f"--op={operation}",
        f"--threads={threads}",
        f"--count={count}",
        f"--limit={limit_s}",
        f"--seed={seed}",
        *targets,
    ]
    result = run_tool(guest, "flush", words, timeout_s=limit_s + _MARGIN_S)
    report = read_report(FlushLoadReport, result.stdout, result.status, result.stderr)
    requested = (seed, threads, len(targets))
    reported = (report.seed, report.threads, report.targets)
    if requested != reported:
        raise ProbeError(f"flush reports {reported}, requested was {requested}")
    if len(report.calls) > threads * count:
        raise ProbeError(f"flush made {len(report.calls)} calls, not {threads} times {count}")
    return report
