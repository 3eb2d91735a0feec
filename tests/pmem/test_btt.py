# SPDX-License-Identifier: GPL-2.0-or-later
"""Sector mode on a DIMM that is flushed by hcall: the flush sleeps, so no caller may be atomic.

drivers/nvdimm/btt.c writes a block as data, log and map. Each write goes through nsio_rw_bytes
(drivers/nvdimm/claim.c), which flushes the region. On pmem=off that is papr_scm_pmem_flush, which
sleeps 10 ms between two hcalls. A held spinlock or disabled preemption is always a bug there; the
kernel's configuration decides which message reports it.
"""

from __future__ import annotations

import re
import time

from paprscm import timesheet
from paprscm.channel.kmsg import SLEEPS, SOFT_LOCKUP, STALLS, has_frame, spins, traces
from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.guest.tools import install_tool
from paprscm.pmem.btt_race import (
    BTT_ISSUE,
    DONE,
    PROGRESS,
    WRITE_PATH,
    RunningWriters,
    btt_sleep,
    expect_written,
    first_write,
    read_writers,
    start_writers,
)
from paprscm.pmem.namespaces import BlockDevice, create_namespace
from paprscm.pmem.regions import wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, PMEM_ON
from paprscm.vm.machine import Machine

THREADS = 4
LIMIT_S = 8
"""Duration of the writes; so far a stuck CPU was always reported within 4 s."""
WATCHDOG_S = 2
"""Watchdog threshold; a CPU that is stuck for twice as long is reported."""


class Btt(PaprScmTest):
    """
    A sector namespace.

    :avocado: tags=flush,btt
    """

    def disk(self, guest: Guest) -> BlockDevice:
        """Create a sector namespace on the whole DIMM; return its disk."""
        region = wait_for_region(guest, 0)
        return create_namespace(guest, region, mode="sector").disk

    def require_sleep_reports(self) -> None:
        """CANCEL unless the kernel reports a sleep in atomic context."""
        self.require_kernel("CONFIG_PREEMPT_COUNT", hint="take -p kernel=debug")

    def test_one_write_off(self) -> None:
        """On pmem=off, a write to a sector namespace does not sleep in atomic context."""
        self.require_sleep_reports()
        guest = self.boot(Machine(nvdimms=(PMEM_OFF,)), allowed=[SLEEPS.pattern])
        trace = first_write(guest, self.disk(guest).path)
        self.measure("first message", trace)
        self.known_issue(
            BTT_ISSUE,
            shows=bool(trace),
            found=btt_sleep(trace)
            if trace
            else "one write of 4 KiB did not sleep in atomic context",
        )

    def test_one_write_on(self) -> None:
        """On pmem=on, a write to a sector namespace does not cause a kernel message."""
        self.require_sleep_reports()
        guest = self.boot(Machine(nvdimms=(PMEM_ON,)))
        disk = self.disk(guest)
        guest.succeed(f"dd if=/dev/zero of={disk.path} bs=4096 count=1 oflag=direct")

    def start(self, guest: Guest, *, seconds: int) -> None:
        """Start the writers, which print their progress on the console."""
        disk = self.disk(guest)
        limit = "/proc/sys/kernel/watchdog_thresh"
        guest.succeed(f"[ ! -e {limit} ] || echo {WATCHDOG_S} > {limit}")
        start_writers(
            guest, install_tool(guest, "same_block"), disk.path, threads=THREADS, seconds=seconds
        )

    def ended(self, guest: Guest, after_s: float) -> int:
        """Check that all writer threads have ended; return the number of writes.

        Args:
            guest: guest of the writers.
            after_s: time since their start, s.
        """
        outcome = read_writers(guest)
        if isinstance(outcome, RunningWriters):
            guest.check()
            raise ContractError(
                f"{len(outcome.states)} of {THREADS} writer threads still running after "
                f"{after_s:g} s, states {' '.join(outcome.states)}, "
                f"{_writes(guest.console.lines)} writes; no CPU is reported as stuck"
            )
        self.metric("writes", sum(outcome.writes), "writes")
        self.metric("duration", outcome.duration_ns / 1e9, "s")
        expect_written(outcome)
        return sum(outcome.writes)

    def test_same_block_off(self) -> None:
        """On pmem=off, four threads that write one block on two CPUs all end."""
        self.require_cpus(2)
        self.require_kernel("CONFIG_SOFTLOCKUP_DETECTOR")
        allowed = [SOFT_LOCKUP.pattern, SLEEPS.pattern, *STALLS]
        guest = self.boot(Machine(nvdimms=(PMEM_OFF,)), allowed=allowed)
        self.start(guest, seconds=LIMIT_S)
        limit_s = LIMIT_S + 20
        match = guest.console.wait_for(
            {"sleeps": SLEEPS, "stuck": SOFT_LOCKUP, "done": DONE},
            timeout_s=limit_s,
            silence_s=float("inf"),
        )
        if match is not None and match[0] == "sleeps":
            # This is reported before a CPU can get stuck; later messages are meaningless.
            guest.console.settle(0.5, 3.0)
            trace = traces(guest.console.lines, SLEEPS)[0]
            guest.kill()
            self.measure("first message", trace)
            self.known_issue(BTT_ISSUE, shows=True, found=btt_sleep(trace))
            return
        if match is None or match[0] == "done":
            writes = self.ended(guest, limit_s)
            guest.check()
            self.known_issue(BTT_ISSUE, shows=False, found=f"{writes} writes of one block")
            return
        self.known_issue(BTT_ISSUE, shows=True, found=self.stuck(guest))

    def stuck(self, guest: Guest) -> str:
        """Prove that a CPU is stuck: it is reported again, and no thread has written meanwhile.

        Raises:
            ContractError: the report has another cause.
        """
        console = guest.console
        console.settle(0.5, 3.0)
        first = next(filter(None, map(SOFT_LOCKUP.search, console.lines)))
        cpu, stuck_s = first["cpu"], int(first["s"])
        again = re.compile(rf"soft lockup - CPU#{cpu} stuck for (\d+)s!")
        writes = _writes(console.lines)
        deadline = time.monotonic() + 10 * WATCHDOG_S
        later = stuck_s
        while later < stuck_s + 2 * WATCHDOG_S and time.monotonic() < deadline:
            # The watchdog of the stuck CPU reports it again.
            timesheet.pause(0.2)
            later = max(int(match[1]) for line in console.lines if (match := again.search(line)))
        status = guest.qmp.execute("query-status")["status"]
        lines = console.lines
        now = _writes(lines)
        trace = traces(lines, again)[-1]
        guest.kill()
        self.metric("writes", now, "writes")
        self.measure("trace", trace)
        if not spins(trace) or not has_frame(trace, *WRITE_PATH):
            raise ContractError(f"a CPU is stuck outside the BTT's write path:\n{trace}")
        if later == stuck_s or now != writes or status != "running":
            raise ContractError(
                f"CPU {cpu} was stuck for {later} s, but recovered; {writes}, then {now} writes; "
                f"QEMU is {status}"
            )
        return (
            f"CPU {cpu} waits for a spinlock in btt_write_pg for {later} s and more, after {now} "
            f"writes, while QEMU answers that the guest is running"
        )

    def test_same_block_on(self) -> None:
        """On pmem=on, four threads that write one block on two CPUs all end."""
        self.require_cpus(2)
        guest = self.boot(Machine(nvdimms=(PMEM_ON,)))
        self.start(guest, seconds=LIMIT_S // 2)
        # Wait for the message instead of a fixed time: the host may be slow.
        guest.console.wait_for({"done": DONE}, timeout_s=60, silence_s=float("inf"))
        self.ended(guest, 60)


def _writes(lines: list[str]) -> int:
    """Number of writes that the threads have reported."""
    return max((int(match[1]) for line in lines if (match := PROGRESS.search(line))), default=0)
