# SPDX-License-Identifier: GPL-2.0-or-later
"""Migration between backends that do and do not require H_SCM_FLUSH.

QEMU commit b5513584a08d ("spapr: nvdimm: Implement H_SCM_FLUSH hcall") (in v7.0), hw/ppc/
spapr_nvdimm.c: spapr_nvdimm_flush_post_load. The guest learns at boot whether it must flush, so the
destination must have the same requirement as the source.
"""

import itertools
from dataclasses import replace

from paprscm.checks import containing
from paprscm.errors import ContractError
from paprscm.hcall.judge import ScmJudge, request
from paprscm.migration.handover import hand_over, save_awake
from paprscm.migration.transfer import LoadError, load
from paprscm.papr import Hcall
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import OVERRIDE, PMEM_OFF, PMEM_ON, SMALL
from paprscm.vm.machine import Machine, Nvdimm, in_words

FLUSH = Hcall.H_SCM_FLUSH
MODES = (PMEM_OFF, PMEM_ON, OVERRIDE, Nvdimm(pmem_override=True))
# By "the source requires flushes".
REASONS = {
    False: "The file backend for the spapr-nvdimm device nv0 at source is a pmem, use pmem=on and "
    "pmem-override=off to continue.",
    True: "The guest expects hcall-flush support for the spapr-nvdimm device nv0, use "
    "pmem_override=on to continue.",
}


class Modes(QemuTest):
    """
    :avocado: tags=hcall,flush,migration
    """

    def machine(self, kind: Nvdimm) -> Machine:
        """A machine with one DIMM of this kind; all have the same file."""
        (dimm,) = self.files.nvdimms()
        dimm = replace(dimm, pmem=kind.pmem, pmem_override=kind.pmem_override)
        return Machine(nvdimms=(dimm,), smp=1, memory_mib=256)

    def test_pairs(self) -> None:
        """A destination accepts a machine if and only if it requires flushes as the source does.

        After a refusal the source goes on, and its pending flush ends once.
        """
        self.files = self.keep(PMEM_OFF.at(0, SMALL))
        modes = self.possible(MODES)
        accepted = 0
        for before in modes:
            machine = self.machine(before)
            judge = ScmJudge(self.bare(machine, shim=self.shim()), machine.nvdimms)
            for after in modes:
                pair = f"{in_words(before)} to {in_words(after)}"
                accepted += self.try_pair(judge, self.machine(after), pair)
            judge.bare.close()
        same = sum(
            one.flushes_by_hcall == other.flushes_by_hcall
            for one, other in itertools.product(modes, modes)
        )
        self.check("number of pairs that migrated", accepted, same)

    def try_pair(self, judge: ScmJudge, machine: Machine, pair: str) -> bool:
        """Migrate with a pending flush if there can be one; True if the destination accepts."""
        (before,), (after,) = judge.nvdimms, machine.nvdimms
        judge.hold(0)
        judge.make(request(FLUSH, before.drc, 0))
        destination = self.bare(machine, shim=self.shim(), source=judge.bare)
        matches = before.flushes_by_hcall == after.flushes_by_hcall
        refusal = ""
        if matches:
            handover = hand_over(judge, destination, held=[0])
            follower = handover.judge
            # Its operation is that of the destination's backend.
            follower.nvdimms = machine.nvdimms
            follower.make(request(FLUSH, before.drc, follower.model.dimms[0].last_token))
            follower.release(0)
            self.check(f"syncs, {pair}", handover.finish(), [])
        else:
            try:
                load(destination.vm, save_awake(judge.bare))
            except LoadError as error:
                refusal = error.text
                self.check(f"exit status, {pair}", error.status, 1)
                self.check(f"message, {pair}", refusal, containing("nv0"))
                reason = REASONS[before.flushes_by_hcall]
                self.usual(f"reason, {pair}", reason in refusal, True)
            else:
                raise ContractError(f"{pair}: the destination accepts the machine")
        destination.close()
        judge.bare.go_on()
        judge.make(request(FLUSH, before.drc, judge.model.dimms[0].last_token))
        judge.release(0)
        judge.poll_to_the_end()
        return matches
