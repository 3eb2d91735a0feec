# SPDX-License-Identifier: GPL-2.0-or-later
"""Live update of QEMU: the machine continues in a new QEMU, with the same memory.

See QEMU's docs/devel/migration/CPR.rst.
"""

from paprscm.errors import CapabilityError
from paprscm.hcall.bare_metal import BareMachine
from paprscm.hcall.judge import ScmJudge, request
from paprscm.migration.handover import hand_over_with
from paprscm.migration.transfer import cpr_exec, cpr_transfer, wait_loaded
from paprscm.papr import Hcall, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine

FLUSH = Hcall.H_SCM_FLUSH


class LiveUpdate(QemuTest):
    """
    :avocado: tags=hcall,flush,migration
    """

    def start(self) -> ScmJudge:
        """A machine with two completed flushes and three pending ones."""
        if not self.qemu.has("machine", "aux-ram-share"):
            raise CapabilityError(f"{self.qemu.path} has no aux-ram-share", hint="QEMU 10.0")
        dimms = self.keep(PMEM_OFF.at(0, SMALL), PMEM_OFF.at(1, SMALL)).nvdimms()
        options = ("aux-ram-share=on",)
        self.machine = Machine(nvdimms=dimms, smp=1, memory_mib=256, options=options)
        judge = ScmJudge(self.bare(self.machine, shim=self.shim()), dimms)
        judge.make(*[request(FLUSH, drc_index(1), 0)] * 2)
        judge.wait_completed(1, 2)
        judge.hold(0)
        judge.make(*[request(FLUSH, drc_index(0), 0)] * 3)
        return judge

    def test_cpr_transfer(self) -> None:
        """Pending and completed flushes continue in a new process of QEMU."""
        judge = self.start()
        shim = self.shim()
        for nvdimm in judge.nvdimms:
            if nvdimm.file and judge.model.dimms[nvdimm.slot].held:
                shim.watch(nvdimm.file).hang()

        def move() -> BareMachine:
            with cpr_transfer(judge.bare.vm) as incoming:
                new = self.bare(self.machine, shim=shim, source=judge.bare, incoming=incoming)
            wait_loaded(new.vm)
            return new

        handover = hand_over_with(judge, move)
        judge.bare.close()
        handover.judge.make(*(request(FLUSH, drc_index(0), token) for token in (0, 1, 2, 3)))
        handover.judge.release(0)
        self.check("syncs", handover.finish(), [])

    def test_cpr_exec(self) -> None:
        """Pending and completed flushes continue in a new QEMU in the same process."""
        judge = self.start()

        def move() -> BareMachine:
            cpr_exec(judge.bare.vm)
            return judge.bare

        follower = hand_over_with(judge, move).judge
        follower.make(*(request(FLUSH, drc_index(0), token) for token in (0, 1, 2, 3)))
        follower.release(0)
        follower.poll_to_the_end()
        follower.make(*(request(FLUSH, drc_index(0), token) for token in (1, 2, 3, 4)))
        # Held syncs end with the old QEMU's threads, without a record of their end.
        for slot, expected in ((0, 3 + 1), (1, 2)):
            self.check(f"syncs of slot {slot}", judge.bare.vm.syncs(slot).counts().ended, expected)
