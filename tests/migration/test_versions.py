# SPDX-License-Identifier: GPL-2.0-or-later
"""Migration between QEMU versions, with a machine type that both of them have.

-p other_qemu=debian:sid selects the other QEMU, as qemu= does. By default these are all QEMUs that
need no download; see binary.local().
"""

from paprscm.debian.packages import Archive
from paprscm.emulator import binary
from paprscm.emulator.binary import Qemu
from paprscm.errors import CapabilityError, ContractError
from paprscm.hcall.judge import ScmJudge, request
from paprscm.migration.handover import hand_over
from paprscm.migration.transfer import LoadError
from paprscm.papr import Hcall, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine

FLUSH, LABEL = Hcall.H_SCM_FLUSH, 0x0123456789ABCDEF
# QEMU commit ee3a71e36654 ("spapr: Add NVDIMM device support") (in v5.0): older types have none.
OLDEST = "pseries-5.0"
# The model of the alias POWER9 depends on the version, and QEMU compares the PVRs.
CPU = "power9_v2.0"
# QEMU "ppc/spapr: remove deprecated machine pseries-2.12" (in v9.2) raised a section's version.
SLB, SLB_VERSION = "cpu/slb: incoming version_id 2", (9, 2, 0)


class Versions(QemuTest):
    """
    :avocado: tags=hcall,flush,migration
    """

    def others(self) -> list[Qemu]:
        """The QEMUs to migrate to."""
        archive = Archive.of(self.settings)
        if setting := self.params.get("other_qemu"):
            return [binary.resolve(archive, str(setting))]
        return [qemu for qemu in binary.local(archive) if qemu.key != self.qemu.key]

    def step(self, judge: ScmJudge, number: int) -> None:
        """Write a label, and leave two more completed flushes, and three more pending ones."""
        label = request(Hcall.H_SCM_WRITE_METADATA, drc_index(0), 8 * number, LABEL + number, 8)
        judge.make(label, *[request(FLUSH, drc_index(1), 0)] * 2)
        judge.wait_completed(1, 2)
        judge.hold(0)
        judge.make(*[request(FLUSH, drc_index(0), 0)] * 3)

    def travel(self, *qemus: Qemu, machine_type: str) -> str:
        """Migrate from each QEMU to the next; return the refusal of the last one, or "".

        At both ends and on the way the machine is compared with the model.
        """
        dimms = self.keep(PMEM_OFF.at(0, SMALL), PMEM_OFF.at(1, SMALL)).nvdimms()
        machine = Machine(nvdimms=dimms, smp=1, memory_mib=256, cpu=CPU, type=machine_type)
        route = " to ".join(qemu.version_text for qemu in qemus)
        self.log.info("%s: %s", machine_type, route)
        judge = ScmJudge(self.bare(machine, shim=self.shim(qemus[0]), qemu=qemus[0]), dimms)
        handover, refusal = None, ""
        for number, qemu in enumerate(qemus[1:]):
            self.step(judge, number)
            destination = self.bare(machine, shim=self.shim(qemu), source=judge.bare, qemu=qemu)
            try:
                handover = hand_over(judge, destination, held=[0])
            except LoadError as error:
                if not error.is_refusal or number + 2 < len(qemus):
                    raise
                refusal = error.text
                judge.bare.go_on()
                break
            judge.bare.close()
            judge = handover.judge
            counts = (handover.completed, handover.pending)
            self.check(f"completed and pending flushes, {route}", counts, (2, 3 * number + 3))
            # Ends the completed ones.
            judge.poll_to_the_end(1)
            judge.make(
                *(
                    request(FLUSH, drc_index(0), token)
                    for token in judge.model.dimms[0].outstanding
                ),
                *(request(Hcall.H_SCM_READ_METADATA, drc_index(0), 8 * n, 8) for n in range(3)),
            )
        judge.make(*(request(FLUSH, drc_index(slot), 0) for slot in (0, 1)))
        judge.release(0)
        judge.poll_to_the_end()
        if handover and not refusal:
            self.check(f"syncs, {route}", handover.compare_syncs(), [])
        judge.bare.close()
        return refusal

    def test_versions(self) -> None:
        """Flushes, tokens and labels survive a migration to another version of QEMU and back.

        After a refusal the source goes on.
        """
        pairs = {}
        for other in self.others():
            common = set(other.pseries_types) & set(self.qemu.pseries_types)
            if not common:
                raise CapabilityError(f"{other.path} and {self.qemu.path} share no pseries type")
            older, newer = sorted((self.qemu, other), key=lambda qemu: qemu.version)
            machine_type = max(common, key=self.qemu.pseries_types.index)
            refusal = self.travel(older, newer, older, machine_type=machine_type)
            pairs[other.version_text] = [machine_type, refusal or "there and back"]
            slb = SLB in refusal
            if older.version < SLB_VERSION <= newer.version and newer is self.qemu:
                found = f"{older.version_text} refuses the machine: {refusal.strip()}"
                self.known_issue("qemu-slb-not-migrated-backwards", shows=slb, found=found)
            elif refusal and not slb:
                raise ContractError(f"{older.version_text} refuses the machine:\n{refusal}")
        self.measure("pairs", pairs)
        if not pairs:
            raise CapabilityError(
                "this machine has no other QEMU", hint="-p other_qemu=debian:trixie"
            )

    def test_oldest_machine_type(self) -> None:
        """The oldest machine type that supports NVDIMMs migrates them as the newest one does."""
        types = self.qemu.pseries_types
        oldest = types[types.index(OLDEST) if OLDEST in types else 0]
        refusal = self.travel(self.qemu, self.qemu, self.qemu, machine_type=oldest)
        self.check(f"refusal of {oldest}", refusal, "")
        self.measure("machine type", oldest)
