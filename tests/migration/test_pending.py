# SPDX-License-Identifier: GPL-2.0-or-later
"""Migration of flushes: pending ones are synced again, completed ones keep their result.

QEMU commit b5513584a08d ("spapr: nvdimm: Implement H_SCM_FLUSH hcall") (in v7.0), hw/ppc/
spapr_nvdimm.c: vmstate_spapr_nvdimm_states, spapr_nvdimm_flush_post_load.
"""

import errno
import itertools

from paprscm.device.hcall_judge import ScmJudge, request
from paprscm.device.mailbox import Call
from paprscm.migration.handover import Handover, compare_syncs, hand_over, save_awake
from paprscm.migration.stream import read_states
from paprscm.migration.transfer import COPIED, SHARED, Way
from paprscm.papr import Hcall, ReturnCode, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import OVERRIDE, PMEM_OFF, SMALL
from paprscm.vm.machine import Machine, Nvdimm

FLUSH = Hcall.H_SCM_FLUSH
# Number of flushes, and of DIMMs among which they are distributed.
CASES = ((0, 1), (1, 1), (16, 2), (64, 4), (1000, 8))
# PAPR: loads and stores in real mode (Linux hvcall.h).
H_LOGICAL_CI_STORE = 0x40


class PendingTest(QemuTest):
    """Base of the tests that migrate machines with flushes."""

    def judge(self, *nvdimms: Nvdimm, smp: int = 1) -> ScmJudge:
        """Start a machine whose files other QEMUs can use, too; return its judge."""
        dimms = self.keep(*nvdimms).nvdimms()
        machine = Machine(nvdimms=dimms, smp=smp, memory_mib=256)
        return ScmJudge(self.bare(machine, shim=self.shim()), dimms)

    def hold(self, judge: ScmJudge, *slots: int) -> None:
        """Hold the syncs of these DIMMs."""
        for slot in slots:
            judge.bare.vm.syncs(slot).hang()
            judge.model.dimms[slot].held = True

    def release(self, judge: ScmJudge, *slots: int) -> None:
        """Let the syncs of these DIMMs end."""
        for slot in slots:
            judge.bare.vm.syncs(slot).clear()
            judge.model.release(slot)

    def move(
        self,
        judge: ScmJudge,
        way: Way = SHARED,
        *,
        held: tuple[int, ...] = (),
        copied: bool = False,
    ) -> Handover:
        """Migrate to a new QEMU; `copied` gives it files and memory of its own."""
        dimms = self.keep(*judge.nvdimms).nvdimms() if copied else judge.nvdimms
        machine = Machine(nvdimms=dimms, smp=judge.bare.board.smp, memory_mib=256)
        destination = self.bare(
            machine, shim=self.shim(), source=judge.bare, shares_memory=not copied
        )
        return hand_over(judge, destination, way, held=held)

    def finish(self, handover: Handover, what: str) -> None:
        """Poll each flush to its end and once more, and compare the syncs."""
        judge = handover.judge
        outstanding = {slot: sorted(dimm.outstanding) for slot, dimm in judge.model.dimms.items()}
        judge.poll_to_the_end()
        judge.make(
            *(
                request(FLUSH, drc_index(slot), token)
                for slot, tokens in outstanding.items()
                for token in tokens
            )
        )
        self.check(f"syncs of the destination, {what}", compare_syncs(handover), [])


class Pending(PendingTest):
    """
    :avocado: tags=hcall,flush,migration
    """

    def test_table(self) -> None:
        """On the destination each token is long-busy until its new sync has ended, then ends once.

        The stream has each flush once, as pending or with its result.
        """
        for count, dimms in CASES:
            slots = tuple(range(dimms))
            judge = self.judge(*(PMEM_OFF.at(slot, SMALL) for slot in slots))
            self.hold(judge, *slots[::2])
            requests = [request(FLUSH, drc_index(n % dimms), 0) for n in range(count)]
            pending = [one for one in requests if one.arguments[0] in map(drc_index, slots[::2])]
            # First those that end without being asked for: later the held ones occupy QEMU's
            # threads.
            judge.make(*(one for one in requests if one not in pending))
            for slot in slots[1::2]:
                judge.bare.vm.syncs(slot).wait_ended(len(requests[slot::dimms]), 60)
            judge.make(*pending)
            handover = self.move(judge, held=slots[::2])
            self.check(f"pending of {count} flushes", handover.pending, len(pending))
            judge.bare.close()
            judge = handover.judge
            judge.make(
                *(
                    request(FLUSH, drc_index(slot), token)
                    for slot in slots[::2]
                    for token in sorted(judge.model.dimms[slot].outstanding)
                )
            )
            self.release(judge, *slots)
            self.finish(handover, f"{count} flushes of {dimms} DIMMs")
            judge.bare.close()

    def test_override(self) -> None:
        """A pending flush of a pmem-override DIMM is synced again over the whole DIMM."""
        judge = self.judge(*self.possible((OVERRIDE.at(0, SMALL), PMEM_OFF.at(1, SMALL))))
        slots = tuple(judge.model.dimms)
        self.hold(judge, *slots)
        judge.make(*(request(FLUSH, drc_index(slot), 0) for slot in slots for _ in range(3)))
        handover = self.move(judge, held=slots)
        self.release(handover.judge, *slots)
        self.finish(handover, "3 flushes of each DIMM")

    def test_contents_in_the_stream(self) -> None:
        """A flush that was pending makes the data durable in the file that the guest has now."""
        judge = self.judge(PMEM_OFF.at(0, SMALL))
        address = judge.model.dimms[0].address
        pattern = 0x8182838485868788
        self.hold(judge, 0)
        stored = judge.bare.call(H_LOGICAL_CI_STORE, 8, address + 4096, pattern)
        self.expect("code of H_LOGICAL_CI_STORE", stored.code, 0)
        judge.make(request(FLUSH, drc_index(0), 0))
        handover = self.move(judge, COPIED, held=(0,), copied=True)
        judge.bare.close()
        self.release(handover.judge, 0)
        self.finish(handover, "a copied DIMM")
        with handover.judge.bare.file(0).open("rb") as file:
            file.seek(4096)
            self.check(
                "content of the destination's file", file.read(8), pattern.to_bytes(8, "big")
            )

    def test_to_and_fro(self) -> None:
        """After ten migrations with the same pending flushes, each of them ends once."""
        judge = self.judge(PMEM_OFF.at(0, SMALL), PMEM_OFF.at(1, SMALL))
        for _ in range(10):
            self.hold(judge, 0, 1)
            judge.make(request(FLUSH, drc_index(0), 0), request(FLUSH, drc_index(1), 0))
            handover = self.move(judge, held=(0, 1))
            judge.bare.close()
            judge = handover.judge
        self.check("flushes that the last machine has loaded", handover.pending, 20)
        self.release(judge, 0, 1)
        self.finish(handover, "ten migrations")

    def test_round_trip(self) -> None:
        """A machine that is loaded and saved again has the same flush state, byte for byte."""
        judge = self.judge(PMEM_OFF.at(0, SMALL), PMEM_OFF.at(1, SMALL))
        self.hold(judge, 0)
        judge.make(*(request(FLUSH, drc_index(slot), 0) for slot in (0, 1) for _ in range(5)))
        judge.bare.vm.syncs(1).wait_ended(5, 60)
        handover = self.move(judge, held=(0,))
        again = save_awake(handover.judge.bare)
        for before, after in itertools.zip_longest(handover.states, read_states(again)):
            self.check(f"bytes of instance {before.instance}", after.pack(), before.pack())

    def test_calls_in_flight(self) -> None:
        """A vCPU that polls a flush during the migration gets its end from the destination."""
        judge = self.judge(PMEM_OFF.at(0, SMALL))
        self.hold(judge, 0)
        judge.make(*(request(FLUSH, drc_index(0), 0) for _ in range(20)))
        polls = [Call(FLUSH, (drc_index(0), token), 1 << 40, True, 100) for token in range(1, 21)]
        judge.bare.start(polls)
        handover = self.move(judge, held=(0,))
        follower = handover.judge
        self.check("polls that ended while they were held", follower.bare.in_progress(), 0)
        self.release(follower, 0)
        answers = follower.bare.finish(timeout_s=60)
        follower.judge([request(FLUSH, *poll.args) for poll in polls], answers)
        self.check("polls that were long-busy", all(answer.busy for answer in answers[:1]), True)
        self.finish(handover, "polls in flight")


class Results(PendingTest):
    """
    The result that the guest gets is that of the sync of its own machine.

    :avocado: tags=hcall,flush,migration
    """

    def test_failures(self) -> None:
        """The destination's sync decides a pending flush, whatever became of the source's.

        A failed flush that was completed before the migration stays failed.
        """
        for failing in (False, True):
            judge = self.judge(PMEM_OFF.at(0, SMALL), PMEM_OFF.at(1, SMALL))
            ended = judge.bare.vm.syncs(1)
            ended.fail(errno.EIO)
            judge.model.dimms[1].failing = True
            self.hold(judge, 0)
            judge.make(request(FLUSH, drc_index(0), 0), request(FLUSH, drc_index(1), 0))
            ended.wait_ended(1, 60)
            # On the source, the held sync ends with the other result, after its state was sent.
            if not failing:
                judge.bare.vm.syncs(0).fail(errno.EIO)
            machine = Machine(nvdimms=judge.nvdimms, smp=1, memory_mib=256)
            destination = self.bare(machine, shim=self.shim(), source=judge.bare)
            handover = hand_over(judge, destination, failing=[0] if failing else [])
            judge.bare.vm.syncs(0).release()
            judge.bare.vm.syncs(0).wait_ended(1, 60)
            follower = handover.judge
            expected = ReturnCode.H_HARDWARE if failing else ReturnCode.H_SUCCESS
            outstanding = follower.model.dimms[0].outstanding
            self.check("expected end of the pending flush", outstanding[1].end, expected)
            self.finish(handover, f"failing {failing}")
            destination.close()
            judge.bare.close()
