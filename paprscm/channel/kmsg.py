# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel messages on the console that report a fault, and their call traces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# printk's time stamp (PRINTK_TIME) and caller (PRINTK_CALLER); both are kernel options.
_STAMP = re.compile(r"^(?:\[\s*\d+\.\d{6}\])?(?:\[\s*[TC]\d+\])? ?")

# Kind, pattern at the start of the message, and True if the guest cannot continue after it.
# Sources: kernel/panic.c, arch/powerpc/kernel/traps.c, kernel/hung_task.c, kernel/watchdog.c,
# kernel/rcu/tree_stall.h, kernel/locking/lockdep.c, lib/bug.c, mm/kasan/report.c,
# mm/kfence/report.c, mm/kmemleak.c, lib/list_debug.c, fs/sysfs/dir.c, kernel/sched/core.c.
_PATTERNS: tuple[tuple[str, re.Pattern[str], bool], ...] = tuple(
    (kind, re.compile(pattern), fatal)
    for kind, pattern, fatal in (
        ("panic", r"Kernel panic - not syncing", True),
        ("panic", r"OS terminated: ", True),
        # xmon stops the guest before the kernel prints its Oops, and waits for input
        # (arch/powerpc/xmon/xmon.c:excprint).
        ("xmon", r"cpu 0x[0-9a-f]+: Vector: [0-9a-f]+ ", True),
        ("oops", r"Oops: ", False),
        ("oops", r"Unable to handle kernel ", False),
        ("oops", r"BUG: Unable to handle kernel ", False),
        ("soft lockup", r"watchdog: BUG: soft lockup", False),
        ("hard lockup", r"watchdog: .*(?:hard LOCKUP|Hard LOCKUP)", False),
        ("hung task", r"INFO: task .* blocked.* for more than ", False),
        ("rcu stall", r"(?:rcu: )?INFO: .*(?:self-detected stall|detected stalls)", False),
        # Lockdep prints brackets: "[ BUG: Invalid wait context ]".
        ("bug", r"(?:kernel |\[ )?BUG[: ]", False),
        # Printed before its WARNING, with more detail.
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

# Messages of every boot. The first two, for every DIMM: QEMU does not implement
# H_SCM_PERFORMANCE_STATS and returns H_FUNCTION (-2), which papr_scm logs (papr_scm.c,
# papr_scm_probe and papr_scm_pmu_register). The third, with VOF instead of SLOF: QEMU's empty NVRAM
# is not formatted (arch/powerpc/kernel/nvram_64.c, nvram_scan_partitions).
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


OOPS = re.compile(r"BUG: (?:Kernel NULL pointer dereference|Unable to handle kernel)")
"""An access to memory that is not there (arch/powerpc/mm/fault.c, bad_page_fault)."""
SLEEPS = re.compile(
    r"BUG: (?:scheduling while atomic|sleeping function called from invalid context)"
)
"""A task slept in atomic context. The scheduler reports it if the kernel has PREEMPT_COUNT (part of
PREEMPT and PREEMPT_LAZY); DEBUG_ATOMIC_SLEEP reports it before the task sleeps."""
SOFT_LOCKUP = re.compile(r"watchdog: BUG: soft lockup - CPU#(?P<cpu>\d+) stuck for (?P<s>\d+)s!")
"""A CPU did not schedule for twice watchdog_thresh (kernel/watchdog.c, watchdog_timer_fn)."""
STALLS = (r"rcu: INFO: ", r"INFO: task .* blocked.* for more than")
"""Messages that a stuck CPU causes."""
# arch/powerpc/kernel/process.c, __show_regs.
_FAULTS = re.compile(r"NIP \[[0-9a-f]+\] (?P<function>\w+)\+")
# With PPC_SPLPAR the CPU may be in a hcall that yields to the owner of the lock.
_SPINS = re.compile(
    r"(?:(?:NIP|LR) |\[[0-9a-f]+\] )\[[0-9a-f]+\] "
    r"(?:queued_spin_lock_slowpath|_raw_spin_lock\w*|yield_\w+|splpar_spin_yield)\+(?!.*unreliable)"
)


@dataclass(frozen=True)
class Trouble:
    """One kernel message that reports a fault.

    Attributes:
        kind: "panic", "oops", "warning", …
        text: the message without its time stamp.
        fatal: the guest cannot continue after it.
    """

    kind: str
    text: str
    fatal: bool


def text_of(line: str) -> str:
    """Return the message of a console line, without time stamp and caller."""
    return _STAMP.sub("", line.rstrip(), count=1)


def classify(line: str, allowed: Iterable[re.Pattern[str]] = ()) -> Trouble | None:
    """Return the fault that a console line reports, or None.

    Args:
        line: the line without its newline.
        allowed: patterns of expected messages; searched in the message.
    """
    message = text_of(line)
    for kind, pattern, fatal in _PATTERNS:
        if pattern.match(message):
            if any(always.match(message) for always in _ALWAYS_LOGGED):
                return None
            if any(expected.search(message) for expected in allowed):
                return None
            return Trouble(kind, message, fatal)
    return None


def traces(lines: Sequence[str], message: re.Pattern[str], *, length: int = 60) -> list[str]:
    """Return the call traces that follow a kernel message, each with that message.

    Args:
        lines: lines of the console.
        message: pattern of the first line of a trace.
        length: maximum number of lines of a trace; it ends before the next such message.
    """
    begins = [number for number, line in enumerate(lines) if message.search(line)]
    ends = [*begins[1:], len(lines)]
    return [
        "\n".join(lines[begin : min(end, begin + length)])
        for begin, end in zip(begins, ends, strict=False)
    ]


def has_frame(trace: str, *functions: str) -> bool:
    """Return True if the call trace has one of these functions; some may have been inlined."""
    return any(f"] {function}+" in trace for function in functions)


def faults_in(trace: str, *functions: str) -> bool:
    """Return True if the instruction that caused an Oops is in one of these functions."""
    found = _FAULTS.search(trace)
    return found is not None and found["function"] in functions


def holds_lock(trace: str, lock: str) -> bool:
    """Return True if lockdep lists this lock as held ("&arena->map_locks[i]")."""
    return f"({lock}" in trace


def spins(trace: str) -> bool:
    """Return True if the CPU of a call trace waits for a spinlock."""
    return _SPINS.search(trace) is not None
