# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's cost of a guest that begins flushes without limit and never polls them.

H_SCM_FLUSH does not limit outstanding flushes, and hands each to the thread pool of QEMU's main
loop, which disks use too (hw/ppc/spapr_nvdimm.c:h_scm_flush; util/thread-pool.c).
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from paprscm import timesheet
from paprscm.checks import at_most
from paprscm.errors import HostError
from paprscm.hcall.bare_metal import BareMachine
from paprscm.hcall.mailbox import Call
from paprscm.papr import Hcall, ReturnCode
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import MIB, Machine

FLUSH = Hcall.H_SCM_FLUSH
DIMM = PMEM_OFF.at(0, SMALL)
POOL_THREADS = 64
"""QEMU util/async.c:aio_context_new, thread_pool_max."""
COSTS = {
    "anonymous_kib": ("anonymous_memory", "KiB"),
    "threads": ("threads", "threads"),
    "monitor_s": ("monitor_response", "s"),
    "disk_write_s": ("disk_write", "s"),
}
"""Metric and unit of each cost."""


class Hostile(QemuTest):
    """
    :avocado: tags=hcall,flush,hostile
    """

    def machine(self) -> BareMachine:
        """Start a machine with four vCPUs, one DIMM whose syncs are counted, and another disk."""
        machine = Machine(nvdimms=(DIMM,), smp=4, memory_mib=256)
        bare = self.bare(machine, shim=self.shim())
        bare.start_cpus(4)
        self.disk = bare.vm.scratch / "disk"
        self.disk.write_bytes(bytes(MIB))
        file = {"driver": "file", "filename": str(self.disk), "aio": "threads"}
        bare.qmp.execute("blockdev-add", driver="raw", node_name="disk", file=file)
        return bare

    def begin(self, bare: BareMachine, count: int) -> None:
        """Begin `count` flushes, a quarter on each vCPU, concurrently."""
        each = [Call(FLUSH, (DIMM.drc, 0), times=count // 4)]
        bare.together(dict.fromkeys(range(4), each), timeout_s=120)

    def cost(self, bare: BareMachine) -> dict[str, float]:
        """QEMU's cost: anonymous memory, threads, and response times."""
        lines = Path(f"/proc/{bare.process.pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        return {
            "anonymous_kib": float(status["RssAnon"].split()[0]),
            "threads": float(status["Threads"]),
            "monitor_s": timed(lambda: bare.qmp.execute("query-status")),
            "disk_write_s": timed(lambda: self.write_disk(bare)),
        }

    def keep_cost(self, state: str, cost: Mapping[str, float]) -> None:
        """Record QEMU's cost in a state of the test."""
        for key, (name, unit) in COSTS.items():
            self.metric(name, cost[key], unit, state=state)

    def write_disk(self, bare: BareMachine) -> None:
        """Write 4 KiB to the other disk, through the thread pool as a guest's request does."""
        self.disk.write_bytes(bytes(4096))
        bare.qmp.hmp('qemu-io disk "write -P 0xa5 0 4096"')
        # qemu-io prints its errors to QEMU's stdout, so check the file.
        if self.disk.read_bytes() != b"\xa5" * 4096:
            raise HostError("the other disk was not written to")

    def never_polled(self, count: int, sync_s: float) -> None:
        """Begin `count` flushes of `sync_s` each, and poll each flush after it has ended."""
        bare = self.machine()
        syncs = bare.vm.syncs(0)
        idle = self.cost(bare)
        syncs.delay(sync_s)
        self.begin(bare, count)
        outstanding = count - syncs.counts().ended
        loaded = self.cost(bare)
        # Far above usual values: a limit for unbounded growth, not for a slow host.
        limits = {
            "anonymous_kib": idle["anonymous_kib"] + 64 * 1024,
            "threads": POOL_THREADS + 32,
            "monitor_s": 5.0,
            # The write waits in the queue for the flushes before it.
            "disk_write_s": count * sync_s / POOL_THREADS + 10.0,
        }
        self.metric("outstanding_flushes", outstanding, "flushes")
        self.keep_cost("idle", idle)
        self.keep_cost("loaded", loaded)
        for name, limit in limits.items():
            self.check(f"{name} with {outstanding} flushes", loaded[name], at_most(limit))
        syncs.wait_ended(count, 120)
        self.check("syncs", syncs.counts().ended, count)
        self.check("concurrent syncs", syncs.counts().most_in_flight, at_most(POOL_THREADS))
        polls = [
            Call(FLUSH, (DIMM.drc, token), 100_000, True, 100) for token in range(1, count + 1)
        ]
        codes = {answer.code for answer in bare.batch(polls, timeout_s=120)}
        self.check("codes of the first poll", codes, {ReturnCode.H_SUCCESS})
        again = bare.batch([Call(FLUSH, poll.args) for poll in polls], timeout_s=120)
        self.check("codes of the second poll", {answer.code for answer in again}, {ReturnCode.H_P2})

    def test_64_outstanding(self) -> None:
        """With 64 concurrent flushes, monitor and disk respond, and each end is reported once."""
        self.never_polled(64, 0.2)

    def test_4096_outstanding(self) -> None:
        """4,096 concurrent flushes have a bounded cost, and each end is reported once."""
        self.never_polled(4096, 0.01)

    def test_without_end(self) -> None:
        """QEMU's memory for flushes that are never polled is limited."""
        bare = self.machine()
        syncs, first, more = bare.vm.syncs(0), 20_000, 200_000
        self.begin(bare, first)
        syncs.wait_ended(first, 120)
        before = self.cost(bare)
        self.begin(bare, more)
        syncs.wait_ended(first + more, 120)
        after = self.cost(bare)
        # One call walks the list of ended flushes while it holds the big QEMU lock.
        unknown = bare.call(FLUSH, DIMM.drc, 1 << 40)
        self.keep_cost("before", before)
        self.keep_cost("after", after)
        self.metric("unknown_token", unknown.duration_s, "s")
        each = (after["anonymous_kib"] - before["anonymous_kib"]) * 1024 / more
        self.known_issue(
            "qemu-flushes-without-limit",
            shows=each >= 32,
            found=f"{more} flushes that are never polled keep {each:.0f} bytes each; one call "
            f"with an unknown token takes {unknown.duration_s * 1000:.0f} ms",
        )

    def test_held_flushes_and_another_disk(self) -> None:
        """Any number of hanging flushes does not block another disk of the machine."""
        bare = self.machine()
        syncs = bare.vm.syncs(0)
        syncs.hang()
        # The control: with idle threads in the pool the write ends while the flushes hang.
        self.begin(bare, POOL_THREADS - 4)
        syncs.wait_begun(POOL_THREADS - 4)
        blocked = self.blocks(lambda: self.write_disk(bare), 20, syncs.release)
        self.expect("with idle threads, a write blocks", blocked, False)
        self.expect("syncs that ended", syncs.counts().ended, 0)
        # The pool starts a thread only if it counts none as idle: more flushes may be needed.
        for _ in range(100):
            self.begin(bare, 4)
            if syncs.counts().begun >= POOL_THREADS:
                break
            # QEMU counts a new thread as idle until it takes its flush.
            timesheet.pause(0.02)
        syncs.wait_begun(POOL_THREADS, 1)
        blocked = self.blocks(lambda: self.write_disk(bare), 2, syncs.release)
        self.known_issue(
            "qemu-flushes-starve-disks",
            shows=blocked,
            found=f"with {POOL_THREADS} flushes hanging, a write to another disk "
            + ("does not end" if blocked else "ends"),
        )

    def test_reset_while_a_flush_hangs(self) -> None:
        """A reset while a flush hangs does not block the monitor."""
        bare = self.machine()
        syncs = bare.vm.syncs(0)
        syncs.hang()
        bare.batch([Call(FLUSH, (DIMM.drc, 0))])
        syncs.wait_begun(1)
        # The control: a flush alone does not stop the monitor.
        blocked = self.blocks(lambda: bare.qmp.execute("query-status"), 20, syncs.release)
        self.expect("a flush alone blocks the monitor", blocked, False)
        self.expect("syncs that ended", syncs.counts().ended, 0)

        def reset() -> None:
            bare.qmp.execute("system_reset")
            # The main loop runs the reset later; these queries wait for it.
            for _ in range(3):
                bare.qmp.execute("query-status")

        blocked = self.blocks(reset, 2, syncs.release)
        self.known_issue(
            "qemu-reset-waits-for-flush",
            shows=blocked,
            found="a reset while a flush hangs "
            + ("stops QEMU's main loop" if blocked else "leaves the monitor able to answer"),
        )

    @timesheet.during("waits")
    def blocks(
        self, action: Callable[[], object], limit_s: float, free: Callable[[], None]
    ) -> bool:
        """True if the action does not end within `limit_s`; then call `free` and wait for it.

        Raises the action's exception: a failed action is neither blocked nor complete.
        """
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(action)
            blocked = bool(wait([done], limit_s).not_done)
            if blocked:
                free()
            done.result(60)
        return blocked


def timed(action: Callable[[], object]) -> float:
    """The longest of five durations, s."""
    durations = []
    for _ in range(5):
        began = time.monotonic()
        action()
        durations.append(time.monotonic() - began)
    return round(max(durations), 6)
