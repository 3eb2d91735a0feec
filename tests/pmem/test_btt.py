# SPDX-License-Identifier: GPL-2.0-or-later
"""Sector mode on a DIMM that is flushed by hcall: the flush sleeps, so nobody may hold it up.

drivers/nvdimm/btt.c writes a block as data, log and map. Behind each is nsio_rw_bytes
(drivers/nvdimm/claim.c), which flushes the region: on pmem=off that is papr_scm_pmem_flush, which
sleeps 10 ms between two hcalls. A spinlock held meanwhile, or preemption that is off, is a bug on
every kernel; which tells it in which way depends on what it was built with.
"""

from __future__ import annotations

import re
import time

from paprscm.errors import CapabilityError, ContractError
from paprscm.guest.guest import Guest
from paprscm.guest.kmsg import traces
from paprscm.guest.tools import compile_tool
from paprscm.pmem.btt_race import (
    BTT_ISSUE,
    DONE,
    PROGRESS,
    SLEEPS,
    WRITE_PATH,
    Running,
    btt_sleep,
    expect_written,
    first_write,
    start,
    state,
)
from paprscm.pmem.namespaces import BlockDevice, create_namespace
from paprscm.pmem.regions import wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.machine import Machine, Nvdimm

# kernel/watchdog.c, watchdog_timer_fn.
LOCKUP = re.compile(r"watchdog: BUG: soft lockup - CPU#(\d+) stuck for (\d+)s!")
# What such a CPU leads to.
STALLS = (r"rcu: INFO: ", r"INFO: task .* blocked.* for more than")
SPINS = re.compile(r"NIP \[[0-9a-f]+\] (?:queued_spin_lock_slowpath|_raw_spin_lock\w*|yield_\w+)\+")
THREADS = 4
LIMIT_S = 8
"""How long they write; a wedged CPU was always there after 4 s."""
WATCHDOG_S = 2
"""A CPU that runs nothing else for twice as long is told."""


class Btt(PaprScmTest):
    """
    A sector namespace.

    :avocado: tags=flush,btt
    """

    def disk(self, guest: Guest) -> BlockDevice:
        """A sector namespace of the whole DIMM."""
        region = wait_for_region(guest, 0, 10)
        return create_namespace(guest, region, mode="sector").disk

    def reports_sleep(self) -> None:
        """CANCEL unless the kernel reports a task that sleeps in atomic context."""
        kernel = self.environment.kernel
        if kernel.option("PREEMPT_COUNT") != "y":
            self.cancel(
                str(
                    CapabilityError(
                        f"the kernel {kernel.release} was built without CONFIG_PREEMPT_COUNT",
                        hint="take -p kernel=debug",
                    )
                )
            )

    def test_one_write_off(self) -> None:
        """On pmem=off, a write to a sector namespace does not sleep in atomic context."""
        self.reports_sleep()
        guest = self.boot(Machine(nvdimms=(Nvdimm(),)), allowed=[SLEEPS.pattern])
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
        """On pmem=on, where nothing sleeps, the same write is no reason for a message."""
        self.reports_sleep()
        guest = self.boot(Machine(nvdimms=(Nvdimm(pmem=True),)))
        disk = self.disk(guest)
        guest.succeed(f"dd if=/dev/zero of={disk.path} bs=4096 count=1 oflag=direct")

    def start(self, guest: Guest, *, seconds: int) -> None:
        """Start the writers; their progress is on the console."""
        disk = self.disk(guest)
        limit = "/proc/sys/kernel/watchdog_thresh"
        guest.succeed(f"[ ! -e {limit} ] || echo {WATCHDOG_S} > {limit}")
        start(guest, compile_tool(guest, "same_block"), disk.path, threads=THREADS, seconds=seconds)

    def ended(self, guest: Guest, after_s: float) -> int:
        """The number of writes of threads that must have ended; their report counts, not the line.

        Args:
            guest: where.
            after_s: how long they were waited for, s.
        """
        found = state(guest)
        if isinstance(found, Running):
            guest.check()
            raise ContractError(
                f"{len(found.states)} of {THREADS} writer threads still running after "
                f"{after_s:g} s, states {' '.join(found.states)}, "
                f"{_writes(guest.console.lines)} writes; no CPU is reported as stuck"
            )
        self.measure("writes", sum(found.writes))
        self.measure("duration_s", found.duration_ns / 1e9)
        expect_written(found)
        return sum(found.writes)

    def test_same_block_off(self) -> None:
        """On pmem=off, four threads that write one block on two CPUs all come to their end."""
        self.two_cpus()
        self.environment.kernel.require_option("SOFTLOCKUP_DETECTOR")
        allowed = [LOCKUP.pattern, SLEEPS.pattern, *STALLS]
        guest = self.boot(Machine(nvdimms=(Nvdimm(),)), allowed=allowed)
        self.start(guest, seconds=LIMIT_S)
        limit_s = LIMIT_S + 20
        found = guest.console.wait_for(
            {"sleeps": SLEEPS, "wedged": LOCKUP, "done": DONE},
            timeout_s=limit_s,
            silence_s=float("inf"),
        )
        if found is not None and found[0] == "sleeps":
            # It is reported before it can wedge a CPU, and after it the counts are wrong.
            guest.console.settle(0.5, 3.0)
            trace = traces(guest.console.lines, SLEEPS)[0]
            guest.kill()
            self.measure("first message", trace)
            self.known_issue(BTT_ISSUE, shows=True, found=btt_sleep(trace))
            return
        if found is None or found[0] == "done":
            writes = self.ended(guest, limit_s)
            guest.check()
            self.known_issue(BTT_ISSUE, shows=False, found=f"{writes} writes of one block")
            return
        self.known_issue(BTT_ISSUE, shows=True, found=self.wedged(guest))

    def wedged(self, guest: Guest) -> str:
        """Prove that a CPU is taken for good: it is told again, and nobody has written meanwhile.

        Raises:
            ContractError: it is something else.
        """
        console = guest.console
        console.settle(0.5, 3.0)
        first = LOCKUP.search(traces(console.lines, LOCKUP)[0])
        assert first is not None
        cpu, stuck_s = first[1], int(first[2])
        again = re.compile(rf"soft lockup - CPU#{cpu} stuck for (\d+)s!")
        writes = _writes(console.lines)
        deadline = time.monotonic() + 10 * WATCHDOG_S
        later = stuck_s
        while later < stuck_s + 2 * WATCHDOG_S and time.monotonic() < deadline:
            time.sleep(0.2)
            later = max(int(one[1]) for line in console.lines if (one := again.search(line)))
        status = guest.qmp.execute("query-status")["status"]
        lines = console.lines
        now = _writes(lines)
        trace = traces(lines, again)[-1]
        guest.kill()
        self.measure("writes", now)
        self.measure("trace", trace)
        if not SPINS.search(trace) or not WRITE_PATH.search(trace):
            raise ContractError(f"a CPU is taken, not by a writer of the BTT:\n{trace}")
        if later == stuck_s or now != writes or status != "running":
            raise ContractError(
                f"CPU {cpu} was taken for {later} s, then not; {writes} and then {now} writes; "
                f"QEMU is {status}"
            )
        return (
            f"CPU {cpu} waits for a spinlock in btt_write_pg for {later} s and more, after {now} "
            f"writes, while QEMU answers that the guest is running"
        )

    def test_same_block_on(self) -> None:
        """On pmem=on, four threads that write one block on two CPUs all come to their end."""
        self.two_cpus()
        guest = self.boot(Machine(nvdimms=(Nvdimm(pmem=True),)))
        self.start(guest, seconds=LIMIT_S // 2)
        # The message's own line counts, however slow the host is.
        guest.console.wait_for({"done": DONE}, timeout_s=60, silence_s=float("inf"))
        self.ended(guest, 60)

    def two_cpus(self) -> None:
        """CANCEL with one CPU: then nobody waits for a lock that its holder sleeps with."""
        if self.settings.smp < 2:
            self.cancel("it takes two CPUs (smp=2)")


def _writes(lines: list[str]) -> int:
    """How many writes the threads have told."""
    return max((int(one[1]) for line in lines if (one := PROGRESS.search(line))), default=0)
