# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel messages on the console that report a fault, and their call traces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# printk's time stamp (PRINTK_TIME) and caller (PRINTK_CALLER); both are options of the kernel.
_STAMP = re.compile(r"^(?:\[\s*\d+\.\d{6}\])?(?:\[\s*[TC]\d+\])? ?")

# Kind, pattern from the start of the message, and whether the guest is lost with it.
# Sources: kernel/panic.c, arch/powerpc/kernel/traps.c, kernel/hung_task.c, kernel/watchdog.c,
# kernel/rcu/tree_stall.h, kernel/locking/lockdep.c, lib/bug.c, mm/kasan/report.c,
# mm/kfence/report.c, mm/kmemleak.c, lib/list_debug.c, fs/sysfs/dir.c, kernel/sched/core.c.
_PATTERNS: tuple[tuple[str, re.Pattern[str], bool], ...] = tuple(
    (kind, re.compile(pattern), fatal)
    for kind, pattern, fatal in (
        ("panic", r"Kernel panic - not syncing", True),
        ("panic", r"OS terminated: ", True),
        # xmon stops the guest before the kernel prints its Oops, and waits for a person
        # (arch/powerpc/xmon/xmon.c:excprint).
        ("xmon", r"cpu 0x[0-9a-f]+: Vector: [0-9a-f]+ ", True),
        ("oops", r"Oops: ", False),
        ("oops", r"Unable to handle kernel ", False),
        ("oops", r"BUG: Unable to handle kernel ", False),
        ("soft lockup", r"watchdog: BUG: soft lockup", False),
        ("hard lockup", r"watchdog: .*(?:hard LOCKUP|Hard LOCKUP)", False),
        ("hung task", r"INFO: task .* blocked.* for more than ", False),
        ("rcu stall", r"(?:rcu: )?INFO: .*(?:self-detected stall|detected stalls)", False),
        # Lockdep has one in brackets: "[ BUG: Invalid wait context ]".
        ("bug", r"(?:kernel |\[ )?BUG[: ]", False),
        # Said before the WARNING that comes with it, and says more.
        ("list", r"list_(?:add|del) corruption", False),
        ("lockdep", r"INFO: trying to register non-static key", False),
        ("sysfs", r"sysfs: cannot create duplicate filename", False),
        ("warning", r"WARNING: ", False),
        ("sanitizer", r"(?:UBSAN|KASAN|KCSAN|KFENCE): ", False),
        ("leak", r"kmemleak: (?!Kernel memory leak detector initialized )", False),
        (
            "driver",
            r"(?:papr_scm|nd_pmem|nd_region|nd_bus|nd_btt|nd_pfn|nd_dax|nvdimm|dax_pmem|device_dax)"
            r"\b.*(?:[Ee]rr(?:or)?\b|[Ff]ail|didn't|[Uu]nable|[Mm]issing|[Ii]nvalid)",
            False,
        ),
    )
)

# What every boot logs. The first two, for every DIMM: QEMU has no H_SCM_PERFORMANCE_STATS, answers
# H_FUNCTION (-2), and papr_scm says so (papr_scm.c, papr_scm_probe and papr_scm_pmu_register).
# The third, where VOF takes the place of SLOF: QEMU's empty NVRAM is not formatted
# (arch/powerpc/kernel/nvram_64.c, nvram_scan_partitions).
_ALWAYS_LOGGED = (
    re.compile(
        r"papr_scm ibm,persistent-memory:ibm,pmemory@[0-9a-f]{8}: "
        r"Failed to query performance stats, Err:-2$"
    ),
    re.compile(
        r"papr_scm ibm,persistent-memory:ibm,pmemory@[0-9a-f]{8}: "
        r"nvdimm pmu didn't register rc=-2$"
    ),
    re.compile(r"WARNING: nvram corruption detected: 0-length partition$"),
)


SLEEPS = re.compile(
    r"BUG: (?:scheduling while atomic|sleeping function called from invalid context)"
)
"""A task slept in atomic context: the scheduler reports it where the kernel counts preemption
(PREEMPT_COUNT, part of PREEMPT and PREEMPT_LAZY), DEBUG_ATOMIC_SLEEP before it happens."""
SOFT_LOCKUP = re.compile(r"watchdog: BUG: soft lockup - CPU#(?P<cpu>\d+) stuck for (?P<s>\d+)s!")
"""A CPU ran nothing else for twice watchdog_thresh (kernel/watchdog.c, watchdog_timer_fn)."""
STALLS = (r"rcu: INFO: ", r"INFO: task .* blocked.* for more than")
"""Messages that follow from a CPU that is stuck."""
_SPINS = re.compile(
    r"NIP \[[0-9a-f]+\] (?:queued_spin_lock_slowpath|_raw_spin_lock\w*|yield_\w+)\+"
)


@dataclass(frozen=True)
class Trouble:
    """One kernel message that no healthy guest prints.

    Attributes:
        kind: "panic", "oops", "warning", …
        text: the message without its time stamp.
        fatal: the guest is gone with it.
    """

    kind: str
    text: str
    fatal: bool


def text_of(line: str) -> str:
    """The message of a line of the console, without time stamp and caller."""
    return _STAMP.sub("", line.rstrip(), count=1)


def classify(line: str, allowed: Iterable[re.Pattern[str]] = ()) -> Trouble | None:
    """Return the fault that a line of the console reports, or None.

    Args:
        line: without its line end.
        allowed: patterns of messages that the test has announced; searched in the message.
    """
    message = text_of(line)
    for kind, pattern, fatal in _PATTERNS:
        if pattern.match(message):
            if any(always.match(message) for always in _ALWAYS_LOGGED):
                return None
            if any(wanted.search(message) for wanted in allowed):
                return None
            return Trouble(kind, message, fatal)
    return None


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


def has_frame(trace: str, *functions: str) -> bool:
    """True if one of these functions is in a call trace; the compiler may have inlined some."""
    return any(f"] {function}+" in trace for function in functions)


def holds_lock(trace: str, lock: str) -> bool:
    """True if lockdep names this lock among the held ones ("&arena->map_locks[i]")."""
    return f"({lock}" in trace


def spins(trace: str) -> bool:
    """True if the CPU of a call trace waits for a spinlock."""
    return _SPINS.search(trace) is not None
