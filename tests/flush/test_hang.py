# SPDX-License-Identifier: GPL-2.0-or-later
"""A sync on the host hangs while the machine is reset and ended, or powered down.

A reset waits in spapr_nvdimm_finish_flushes (QEMU hw/ppc/spapr_nvdimm.c) until no flush is pending.
A powerdown is carried out by the guest: its nd_pmem first flushes each DIMM that has a namespace
(Linux drivers/nvdimm/pmem.c, nd_pmem_shutdown). tests/migration/test_ends.py has the ends that do
not wait for flushes, and the restarts.

Every hang is bounded: the shim finally releases the sync, and QEMU must exit.
"""

from __future__ import annotations

import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

from paprscm import timesheet
from paprscm.errors import GuestLostError
from paprscm.flush.syscalls import persist
from paprscm.guest.guest import Guest
from paprscm.pmem.namespaces import create_namespace
from paprscm.pmem.regions import find_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine

DIMM = PMEM_OFF.at(2, SMALL)
HELD_S = 2.0
"""Duration for which a hang is observed."""
SOON_S = 30.0
"""Time limit, on a busy host, for an action that does not hang."""


class FlushHang(PaprScmTest):
    """
    Reset, exit and powerdown of a machine while a flush hangs.

    :avocado: tags=flush
    """

    def hanging(self, *, namespace: bool = False) -> Guest:
        """Boot a guest with one hanging flush, of a DIMM with or without a namespace."""
        guest = self.boot(Machine(nvdimms=(DIMM,)), shim=self.shim())
        dimm_region, syncs = find_region(guest, DIMM.slot), guest.vm.syncs(DIMM.slot)
        if namespace:
            create_namespace(guest, dimm_region, mode="raw")
        # The control: a flush succeeds before the shim holds syncs.
        path = f"{dimm_region.device}/deep_flush"
        (step,) = persist(guest, path, "dwrite=0:1:49")
        self.expect("errno of the control", step.errno, 0)
        self.begun = syncs.counts().ended
        syncs.hang()
        guest.succeed(f"echo 1 > {path} 2> /tmp/said < /dev/null &")
        self.begun = syncs.wait_begun(self.begun + 1).begun
        return guest

    @timesheet.during("waits")
    def expect_end(self, guest: Guest, limit_s: float) -> float:
        """Wait until QEMU has ended with status 0; return the duration, s."""
        began = time.monotonic()
        status = guest.process.wait(limit_s)
        took_s = time.monotonic() - began
        self.expect(f"QEMU's exit status after {took_s:.1f} s", status, 0)
        self.check("trouble on the console", guest.console.trouble, None)
        # Records that the guest has ended as expected.
        guest.kill()
        return round(took_s, 3)

    def powered_down(self, guest: Guest) -> bool:
        """True if the kernel has printed its last message (kernel/reboot.c, kernel_power_off)."""
        return "reboot: Power down" in "\n".join(guest.console.lines)

    def begin_reset(self, guest: Guest, pool: ThreadPoolExecutor) -> Future[object]:
        """Begin a reset of the machine, which may take as long as the flush."""
        # The suite's guests end with the first reset (-no-reboot).
        guest.qmp.execute("set-action", reboot="reset")

        def reset() -> None:
            guest.qmp.execute("system_reset")
            # The main loop runs the reset later; these queries wait for it.
            for _ in range(3):
                guest.qmp.execute("query-status")

        return pool.submit(reset)

    def test_reset_then_terminate(self) -> None:
        """SIGTERM after a reset during a hanging flush ends QEMU when the flush ends."""
        guest = self.hanging()
        syncs = guest.vm.syncs(DIMM.slot)
        with ThreadPoolExecutor(1) as pool:
            done = self.begin_reset(guest, pool)
            try:
                with timesheet.during("waits"):
                    blocked = bool(wait([done], HELD_S).not_done)
                self.expect("syncs that ended", syncs.counts().ended, self.begun - 1)
                guest.process.send_signal(signal.SIGTERM)
                with timesheet.during("waits"):
                    early = guest.process.wait(HELD_S) is not None
                self.measure("ended by SIGTERM while the flush hangs", early)
                self.expect("the reset ended with QEMU", done.done(), early)
                syncs.release()
                self.metric("end_after_release", self.expect_end(guest, SOON_S), "s")
                # The reset's answer may have been lost.
                if done.exception(SOON_S) is not None:
                    lost = isinstance(done.exception(), GuestLostError)
                    self.check(f"QEMU's end ends the reset: {done.exception()!r}", lost, True)
            finally:
                syncs.release()
        self.known_issue(
            "qemu-reset-waits-for-flush",
            shows=blocked,
            found=f"{HELD_S:g} s after a reset while a flush hangs the monitor "
            + ("does not answer" if blocked else "answers"),
        )

    def test_powerdown_with_namespace(self) -> None:
        """A guest does not power down before a DIMM with a namespace is flushed."""
        guest = self.hanging(namespace=True)
        syncs = guest.vm.syncs(DIMM.slot)
        guest.qmp.execute("system_powerdown")
        # nd_pmem's flush, in addition to the one that hangs: the guest got the powerdown request.
        syncs.wait_begun(self.begun + 1)
        with timesheet.during("waits"):
            status = guest.process.wait(HELD_S)
        self.expect("QEMU's exit status while the flush hangs", status, None)
        self.expect("the guest has powered down", self.powered_down(guest), False)
        # QEMU itself still works.
        self.expect("QEMU's status", guest.qmp.execute("query-status")["status"], "running")
        self.expect("syncs that ended", syncs.counts().ended, self.begun - 1)
        syncs.release()
        self.metric("end_after_release", self.expect_end(guest, SOON_S), "s")
        counts = syncs.counts()
        self.check("syncs that ended", counts.ended, counts.begun)
        self.usual("flushes of a powerdown", counts.begun - self.begun, 1)
