# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways in which QEMU can migrate a machine carry its flushes alike.

See QEMU's docs/devel/migration/. A way that a QEMU lacks is left out, and recorded.
"""

import time
from pathlib import Path

from paprscm.checks import containing
from paprscm.emulator.qmp import RefusedError
from paprscm.errors import CapabilityError
from paprscm.hcall.bare_metal import BareMachine
from paprscm.hcall.judge import ScmJudge, request
from paprscm.migration.handover import hand_over_by
from paprscm.migration.transfer import LoadError, Way
from paprscm.papr import Hcall, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.backing_files import BackingFiles
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine

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
# Slow at first, so that the machine moves while most of its memory is at the source.
POSTCOPY = Way(
    name="postcopy",
    scheme="unix",
    capabilities=("postcopy-ram",),
    parameters={"max-bandwidth": 1 << 20},
    contents=True,
)
# A file system for which QEMU permits postcopy (migration/postcopy-ram.c).
TMPFS = Path("/dev/shm")  # noqa: S108


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
                judge.wait_completed(slot, len(requests[slot :: len(slots)]))
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

    def test_postcopy(self) -> None:
        """Pending flushes arrive at a destination that runs before it has all of the memory.

        Or it refuses postcopy, with a reason, and the source goes on.
        """
        found, late = {}, ""
        for folder in (TMPFS, self.settings.scratch_dir):
            machines = []
            for _ in range(2):
                files = BackingFiles(folder, [PMEM_OFF.at(0, SMALL)])
                dimms = self.leave.enter_context(files).nvdimms()
                machines.append(Machine(nvdimms=dimms, smp=1, memory_mib=256))
            source = self.bare(machines[0], shim=self.shim())
            judge = ScmJudge(source, machines[0].nvdimms)
            judge.make(*[request(FLUSH, drc_index(0), 0)] * 2)
            judge.wait_completed(0, 2)
            judge.hold(0)
            judge.make(*[request(FLUSH, drc_index(0), 0)] * 3)
            destination = self.bare(
                machines[1], shim=self.shim(), source=source, shares_memory=False
            )
            try:
                handover = hand_over_by(judge, destination, POSTCOPY)
            except RefusedError as error:
                found[str(folder)] = error.text
                self.check("reason of the refusal", error.text, containing("ostcopy"))
                destination.close()
                source.go_on()
                judge.release(0)
                judge.poll_to_the_end()
            except LoadError as error:
                status = self.wait_settled(source)
                if "userfault register" not in error.text or status != "postcopy-paused":
                    raise
                found[str(folder)] = late = f"the source is {status}: {error.text.strip()}"
                destination.close()
            else:
                sent = source.qmp.execute("query-migrate")["ram"]["postcopy-bytes"]
                found[str(folder)] = f"{sent} bytes after the machine"
                self.check("bytes sent after the machine", sent > 0, True)
                handover.judge.make(request(FLUSH, drc_index(0), 0))
                handover.judge.release(0)
                self.check(f"syncs, {folder}", handover.finish(), [])
                destination.close()
            source.close()
        # Without userfaultfd, QEMU refuses postcopy for another reason.
        if late or any("TMPFS" in text for text in found.values()):
            self.known_issue(
                "qemu-postcopy-refused-late", shows=bool(late), found=late or str(found)
            )
        self.measure("postcopy", found)

    def wait_settled(self, source: BareMachine) -> str:
        """Wait until a source has noticed that its destination is gone; return the status."""
        deadline = time.monotonic() + 30
        while True:
            status = str(source.qmp.execute("query-migrate")["status"])
            if not status.endswith("active") or time.monotonic() > deadline:
                return status
            # The event may have come already.
            time.sleep(0.005)
