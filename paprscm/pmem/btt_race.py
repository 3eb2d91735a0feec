# SPDX-License-Identifier: GPL-2.0-or-later
"""Writers of a sector namespace (guest_tools/same_block.c): start, report, state, messages."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from paprscm.channel.kmsg import SLEEPS, has_frame, holds_lock, traces
from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.report import Natural, ProbeError, ToolReport, check_report, read_report

PROGRESS = re.compile(r"same_block: (\d+) writes$")
DONE = re.compile(r"same_block: done$")
"""Lines that same_block writes to the console."""

BTT_ISSUE = "linux-btt-sleeps-under-spinlock"
WRITE_PATH = ("btt_write_pg", "btt_do_bvec", "btt_submit_bio")
"""The call trace of a write has one of these: kernels built for size inline the first."""
_WRITTEN = re.compile(r"one block written$")

# First the tool's pid, to list its threads while it runs; at its end the status.
_START = """
echo on > /proc/sys/kernel/printk_devkmsg
setsid sh -c '"$@" > /tmp/same_block.out 2> /tmp/same_block.err &
	echo $! > /tmp/same_block.pid; wait $!; echo $? > /tmp/same_block.status' \
	sh {words} < /dev/null > /dev/null 2>&1 &
"""
_STATE = """
for try in $(seq 50); do
	# Its last line on the console comes a moment before its end.
	[ -s /tmp/same_block.status ] || sleep 0.1
done
if [ -s /tmp/same_block.status ]; then
	echo ended; cat /tmp/same_block.status /tmp/same_block.out; cat /tmp/same_block.err >&2
else
	read -r pid < /tmp/same_block.pid; echo $pid; cat /proc/$pid/task/[0-9]*/stat
fi
"""


class SameBlockReport(ToolReport, frozen=True, kw_only=True):
    """The report of guest_tools/same_block.c.

    Attributes:
        threads: number of writers.
        writes: number of writes of each thread.
        moves: number of moves of a thread to another CPU.
        duration_ns: total duration.
        errno: errno of the first failed write, or 0.
        whole: the block holds the data of one thread only.
    """

    tool: Literal["same_block"]
    threads: Natural
    writes: tuple[Natural, ...]
    moves: Natural
    duration_ns: Natural
    errno: Natural
    whole: bool

    def __post_init__(self) -> None:
        check_report(len(self.writes) == self.threads, f"writes is {self.writes}")

    @property
    def exit_status(self) -> int:
        return int(self.errno > 0 or not self.whole)


@dataclass(frozen=True)
class RunningWriters:
    """Writers that have not ended.

    Attributes:
        states: state of each writer thread in /proc/PID/stat: "R", "D", …
    """

    states: tuple[str, ...]


def start_writers(
    guest: Guest, tool: PurePosixPath, disk: str, *, threads: int, seconds: int
) -> None:
    """Start the writers in the background; they print their progress to the console.

    Args:
        guest: the guest.
        tool: the compiled guest_tools/same_block.c.
        disk: path of a block device.
        threads: number of writers.
        seconds: duration of the writes, s.
    """
    words = [str(tool), f"--threads={threads}", f"--seconds={seconds}", "--progress=/dev/kmsg"]
    # printk would drop more than 10 lines in 5 s (kernel/printk/printk.c, devkmsg_write).
    guest.succeed(_START.format(words=shlex.join([*words, disk])))


def read_writers(guest: Guest, *, timeout_s: float = 30.0) -> SameBlockReport | RunningWriters:
    """Return the writers' report if they have ended, else the state of their threads.

    Raises:
        ProbeError: the tool ended without a valid report.
    """
    result = guest.run(_STATE, timeout_s=timeout_s)
    return parse_writers(result.stdout, result.stderr)


def parse_writers(stdout: str, stderr: str = "") -> SameBlockReport | RunningWriters:
    """Parse the tool's report or /proc/PID/task/*/stat, as printed by the shell.

    Raises:
        ProbeError: the output is neither.
    """
    first, _, rest = stdout.partition("\n")
    if first == "ended":
        status, _, report = rest.partition("\n")
        return read_report(
            SameBlockReport, report, int(status) if status.isdecimal() else -1, stderr
        )
    # comm may contain blanks and brackets; the state follows the last bracket (proc(5)).
    threads = re.findall(r"^([0-9]+) \(.*\) ([A-Za-z]) ", rest, re.MULTILINE)
    states = tuple(letter for tid, letter in threads if tid != first)
    if not states:
        raise ProbeError(f"same_block has no writer threads: {stdout!r}, {stderr!r}")
    return RunningWriters(states)


def expect_written(report: SameBlockReport) -> None:
    """Assert that all threads wrote, and that the block holds the data of one.

    Raises:
        ContractError: a write failed, or the block holds the data of two threads.
        HostError: a thread never wrote, or none moved to another CPU: nothing was tested.
    """
    if report.errno or not report.whole:
        state = "whole" if report.whole else "torn"
        raise ContractError(f"the block is {state}, the first error is errno {report.errno}")
    if not all(report.writes) or not report.moves:
        raise HostError(f"not every thread wrote and was moved: {report}")


def btt_sleep(trace: str) -> str:
    """Description of the known BTT bug that `trace` shows.

    Args:
        trace: a message that matches SLEEPS, with its call trace.

    Raises:
        ContractError: the sleep is not in a flush of the BTT.
    """
    if not has_frame(trace, *WRITE_PATH) or not has_frame(trace, "papr_scm_pmem_flush"):
        raise ContractError(f"a task sleeps in atomic context, not in a flush of the BTT:\n{trace}")
    locked = holds_lock(trace, "&arena->map_locks[i]")
    lock = " with the lock of the block's map entry" if locked else ""
    return f"papr_scm_pmem_flush sleeps below btt_write_pg in atomic context{lock}"


def first_write(guest: Guest, disk: str) -> str:
    """Write one block; return the kernel's message if the write slept in atomic context, else "".

    Only the first message counts: after it preempt_count is wrong (kernel/sched/core.c,
    schedule_debug), so later ones are meaningless, and the guest is killed.

    Args:
        guest: a guest that allows SLEEPS among its messages.
        disk: path of the sector namespace's disk.

    Raises:
        ContractError: after 60 s the write has not ended, and the kernel reports nothing.
    """
    guest.succeed(
        f"setsid sh -c 'dd if=/dev/zero of={disk} bs=4096 count=1 oflag=direct && "
        f'echo "<1>one block written" > /dev/kmsg\' > /dev/null 2>&1 < /dev/null &'
    )
    console = guest.console
    event = console.wait_for(
        {"sleeps": SLEEPS, "written": _WRITTEN}, timeout_s=60, silence_s=float("inf")
    )
    console.settle(1.0, 10.0)
    if messages := traces(console.lines, SLEEPS):
        guest.kill()
        return messages[0]
    guest.check()
    if event is None:
        raise ContractError("a write of one block did not end within 60 s")
    return ""
