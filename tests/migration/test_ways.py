# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways in which QEMU can migrate a machine carry its flushes alike.

See QEMU's docs/devel/migration/. A way that a QEMU lacks is left out, and recorded.
"""

from paprscm.device.hcall_judge import ScmJudge, request
from paprscm.errors import CapabilityError
from paprscm.migration.handover import hand_over_by
from paprscm.migration.transfer import Way
from paprscm.papr import Hcall, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine
from paprscm.vm.qmp import RefusedError

FLUSH = Hcall.H_SCM_FLUSH
WAYS = (
    Way(name="unix", scheme="unix"),
    Way(name="exec", scheme="exec"),
    Way(name="file", scheme="file"),
    Way(name="multifd", scheme="unix", capabilities=("multifd",)),
    Way(name="mapped-ram", scheme="file", capabilities=("mapped-ram",), contents=True),
    Way(
        name="mapped-ram and multifd",
        scheme="file",
        capabilities=("mapped-ram", "multifd"),
        contents=True,
    ),
    Way(name="background-snapshot", scheme="exec", capabilities=("background-snapshot",)),
    Way(name="cpr-reboot", scheme="file", parameters={"mode": "cpr-reboot"}),
    Way(name="return-path", scheme="unix", capabilities=("return-path",)),
    Way(name="switchover-ack", scheme="unix", capabilities=("return-path", "switchover-ack")),
)


class Ways(QemuTest):
    """
    :avocado: tags=hcall,flush,migration
    """

    def test_ways(self) -> None:
        """Pending and completed flushes arrive by every way that this QEMU has."""
        count = int(self.params.get("flushes", default=6))
        slots = range(int(self.params.get("dimms", default=2)))
        dimms = self.keep(*(PMEM_OFF.at(slot, SMALL) for slot in slots)).nvdimms()
        machine = Machine(nvdimms=dimms, slots=max(8, len(slots)), smp=1, memory_mib=256)
        requests = [request(FLUSH, drc_index(number % len(slots)), 0) for number in range(count)]
        # The flushes of every other DIMM have ended when the machine is saved.
        held, ended = slots[::2], slots[1::2]
        missing, counts = {}, {}
        for way in WAYS:
            judge = ScmJudge(self.bare(machine, shim=self.shim()), dimms)
            for slot in ended:
                judge.make(*requests[slot :: len(slots)])
                judge.bare.vm.syncs(slot).wait_ended(len(requests[slot :: len(slots)]), 60)
            judge.hold(*held)
            for slot in held:
                judge.make(*requests[slot :: len(slots)])
            destination = self.bare(machine, shim=self.shim(), source=judge.bare)
            try:
                handover = hand_over_by(judge, destination, way)
            except RefusedError as error:
                # Before the migration: one of the QEMUs lacks a capability or a parameter.
                missing[way.name] = error.text
                destination.close()
                judge.bare.go_on()
                judge.release(*held)
                judge.poll_to_the_end()
            else:
                handover.judge.release(*held)
                self.check(f"syncs, {way.name}", handover.finish(), [])
                counts[way.name] = {
                    "pending": handover.pending,
                    "completed": handover.completed,
                    "syncs": [
                        sum(bare.vm.syncs(slot).counts().begun for slot in slots)
                        for bare in (judge.bare, destination)
                    ],
                }
                destination.close()
            judge.bare.close()
        self.measure("ways left out", missing)
        self.measure("flushes by way", counts)
        self.log.info("ways left out: %s", missing)
        if not counts:
            raise CapabilityError("this QEMU has none of the ways")
