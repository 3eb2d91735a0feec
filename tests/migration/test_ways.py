# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways in which QEMU can migrate a machine carry its flushes alike.

See QEMU's docs/devel/migration/. A way that a QEMU lacks is left out, and recorded.
"""

from paprscm.device.hcall_judge import ScmJudge, request
from paprscm.errors import CapabilityError
from paprscm.migration.handover import go_on, hand_over_by
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
        dimms = self.keep(PMEM_OFF.at(0, SMALL), PMEM_OFF.at(1, SMALL)).nvdimms()
        machine = Machine(nvdimms=dimms, smp=1, memory_mib=256)
        missing = {}
        for way in WAYS:
            judge = ScmJudge(self.bare(machine, shim=self.shim()), dimms)
            judge.make(*[request(FLUSH, drc_index(1), 0)] * 3)
            judge.bare.vm.syncs(1).wait_ended(3, 60)
            judge.hold(0)
            judge.make(*[request(FLUSH, drc_index(0), 0)] * 3)
            destination = self.bare(machine, shim=self.shim(), source=judge.bare)
            self.log.info("way: %s", way.name)
            try:
                handover = hand_over_by(judge, destination, way)
            except RefusedError as error:
                # Before the migration: one of the QEMUs lacks a capability or a parameter.
                missing[way.name] = error.text
                destination.close()
                go_on(judge.bare)
                judge.release(0)
                judge.poll_to_the_end()
            else:
                handover.judge.release(0)
                self.check(f"syncs, {way.name}", handover.finish(), [])
                destination.close()
            judge.bare.close()
        self.measure("ways left out", missing)
        self.log.info("ways left out: %s", missing)
        if len(missing) == len(WAYS):
            raise CapabilityError("this QEMU has none of the ways")
