# SPDX-License-Identifier: GPL-2.0-or-later
"""Migration of flushes: pending ones are synced again, completed ones keep their result.

QEMU commit b5513584a08d ("spapr: nvdimm: Implement H_SCM_FLUSH hcall") (in v7.0), hw/ppc/
spapr_nvdimm.c: vmstate_spapr_nvdimm_states, spapr_nvdimm_flush_post_load.
"""

import errno
import itertools

from paprscm.hcall.judge import ScmJudge, request
from paprscm.hcall.mailbox import Call
from paprscm.migration.handover import Handover, hand_over, save_awake
from paprscm.migration.stream import read_states
from paprscm.migration.transfer import COPIED, load
from paprscm.papr import Hcall, ReturnCode, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import OVERRIDE, PMEM_OFF, SMALL
from paprscm.vm.machine import Machine, Nvdimm

FLUSH = Hcall.H_SCM_FLUSH
# Number of flushes, and of DIMMs among which they are distributed.
CASES = ((0, 1), (1, 1), (16, 2), (64, 4), (1000, 8))
# PAPR: loads and stores in real mode (Linux hvcall.h).
H_LOGICAL_CI_STORE = 0x40
PLACE, PATTERN = 4096, bytes.fromhex("8182838485868788")


class Pending(QemuTest):
    """
    :avocado: tags=hcall,flush,migration
    """

    def start(self, *nvdimms: Nvdimm) -> ScmJudge:
        """Start a machine whose files other QEMUs can use, too; return its judge."""
        dimms = self.keep(*nvdimms).nvdimms()
        machine = Machine(nvdimms=dimms, smp=1, memory_mib=256)
        return ScmJudge(self.bare(machine, shim=self.shim()), dimms)

    def move(self, judge: ScmJudge, *, held: tuple[int, ...] = ()) -> Handover:
        """Migrate to a new QEMU with the same files."""
        machine = Machine(nvdimms=judge.nvdimms, smp=1, memory_mib=256)
        destination = self.bare(machine, shim=self.shim(), source=judge.bare)
        return hand_over(judge, destination, held=held)

    def test_table(self) -> None:
        """On the destination each token is long-busy until its new sync has ended, then ends once.

        The stream has each flush once, as pending or with its result.
        """
        for count, dimms in CASES:
            slots = tuple(range(dimms))
            judge = self.start(*(PMEM_OFF.at(slot, SMALL) for slot in slots))
            judge.hold(*slots[::2])
            requests = [request(FLUSH, drc_index(n % dimms), 0) for n in range(count)]
            pending = [one for one in requests if one.arguments[0] in map(drc_index, slots[::2])]
            # First those that end without being asked for: later the held ones occupy QEMU's
            # threads.
            judge.make(*(one for one in requests if one not in pending))
            for slot in slots[1::2]:
                judge.wait_completed(slot, len(requests[slot::dimms]))
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
            judge.release(*slots)
            self.check(f"{count} flushes of {dimms} DIMMs", handover.finish(), [])
            judge.bare.close()

    def test_override(self) -> None:
        """A pending flush of a pmem-override DIMM is synced again over the whole DIMM."""
        judge = self.start(*self.possible((OVERRIDE.at(0, SMALL), PMEM_OFF.at(1, SMALL))))
        slots = tuple(judge.model.dimms)
        judge.hold(*slots)
        judge.make(*(request(FLUSH, drc_index(slot), 0) for slot in slots for _ in range(3)))
        handover = self.move(judge, held=slots)
        handover.judge.release(*slots)
        self.check("3 flushes of each DIMM", handover.finish(), [])

    def copy(self, judge: ScmJudge, *, held: tuple[int, ...] = ()) -> Handover:
        """Store a pattern in slot 0, flush, and migrate to a QEMU with files of its own."""
        address = judge.model.dimms[0].address + PLACE
        stored = judge.bare.call(H_LOGICAL_CI_STORE, 8, address, int.from_bytes(PATTERN, "big"))
        self.expect("code of H_LOGICAL_CI_STORE", stored.code, 0)
        judge.make(request(FLUSH, drc_index(0), 0))
        if not held:
            judge.poll_to_the_end()
        copies = self.keep(*judge.nvdimms).nvdimms()
        machine = Machine(nvdimms=copies, smp=1, memory_mib=256)
        destination = self.bare(machine, shim=self.shim(), source=judge.bare, shares_memory=False)
        handover = hand_over(judge, destination, COPIED, held=held)
        judge.bare.close()
        with destination.file(0).open("rb") as file:
            file.seek(PLACE)
            self.check("content of the destination's file", file.read(8), PATTERN)
        return handover

    def test_contents_in_the_stream(self) -> None:
        """A flush that was pending makes the data durable in the file that the guest has now."""
        judge = self.start(PMEM_OFF.at(0, SMALL))
        judge.hold(0)
        handover = self.copy(judge, held=(0,))
        handover.judge.release(0)
        self.check("a copied DIMM", handover.finish(), [])

    def test_promise_in_another_file(self) -> None:
        """Data of a flush that has succeeded are durable in the file that the guest has now."""
        handover = self.copy(self.start(PMEM_OFF.at(0, SMALL)))
        syncs = handover.judge.bare.vm.syncs(0)
        whole = len(syncs.records()) - len(syncs.partial(SMALL))
        self.known_issue(
            "qemu-migration-leaves-dimm-unsynced",
            shows=whole == 0,
            found=f"{whole} syncs of a DIMM's new file after the migration",
        )

    def test_to_and_fro(self) -> None:
        """After ten migrations with the same pending flushes, each of them ends once."""
        judge = self.start(PMEM_OFF.at(0, SMALL), PMEM_OFF.at(1, SMALL))
        for _ in range(10):
            judge.hold(0, 1)
            judge.make(request(FLUSH, drc_index(0), 0), request(FLUSH, drc_index(1), 0))
            handover = self.move(judge, held=(0, 1))
            judge.bare.close()
            judge = handover.judge
        self.check("flushes that the last machine has loaded", handover.pending, 20)
        judge.release(0, 1)
        self.check("ten migrations", handover.finish(), [])

    def test_round_trip(self) -> None:
        """A machine that is loaded and saved again has the same flush state, byte for byte."""
        judge = self.start(PMEM_OFF.at(0, SMALL), PMEM_OFF.at(1, SMALL))
        judge.hold(0)
        judge.make(*(request(FLUSH, drc_index(slot), 0) for slot in (0, 1) for _ in range(5)))
        judge.wait_completed(1, 5)
        handover = self.move(judge, held=(0,))
        again = save_awake(handover.judge.bare)
        for before, after in itertools.zip_longest(handover.states, read_states(again)):
            self.check(f"bytes of instance {before.instance}", after.pack(), before.pack())

    def test_calls_in_flight(self) -> None:
        """A vCPU that polls a flush during the migration gets its end from the destination."""
        judge = self.start(PMEM_OFF.at(0, SMALL))
        judge.hold(0)
        judge.make(*(request(FLUSH, drc_index(0), 0) for _ in range(20)))
        polls = [Call(FLUSH, (drc_index(0), token), 1 << 40, True, 100) for token in range(1, 21)]
        judge.bare.start(polls)
        handover = self.move(judge, held=(0,))
        follower = handover.judge
        self.check("polls that ended while they were held", follower.bare.in_progress(), 0)
        follower.release(0)
        answers = follower.bare.finish(timeout_s=60)
        follower.judge([request(FLUSH, *poll.args) for poll in polls], answers)
        self.check("polls that were long-busy", all(answer.busy for answer in answers[:1]), True)
        self.check("polls in flight", handover.finish(), [])

    def test_failures(self) -> None:
        """The destination's sync decides a pending flush, whatever became of the source's.

        A failed flush that was completed before the migration stays failed.
        """
        for failing in (False, True):
            judge = self.start(PMEM_OFF.at(0, SMALL), PMEM_OFF.at(1, SMALL))
            ended = judge.bare.vm.syncs(1)
            ended.fail(errno.EIO)
            judge.model.dimms[1].failing = True
            judge.hold(0)
            judge.make(request(FLUSH, drc_index(0), 0), request(FLUSH, drc_index(1), 0))
            judge.wait_completed(1, 1)
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
            self.check(f"failing {failing}", handover.finish(), [])
            destination.close()
            judge.bare.close()

    def test_error_after_save(self) -> None:
        """If the source's sync fails, the guest is not told that its flush has succeeded.

        The kernel reports a failed write-back once to each open file, and marks the pages as clean
        (Linux Documentation/filesystems/vfs.rst, "Writeback errors"). A destination that opens the
        file after that cannot learn of it.
        """
        judge = self.start(PMEM_OFF.at(0, SMALL))
        judge.hold(0)
        judge.make(request(FLUSH, drc_index(0), 0))
        stream = save_awake(judge.bare)
        (state,) = read_states(stream)
        syncs = judge.bare.vm.syncs(0)
        syncs.fail(errno.EIO)
        syncs.release()
        syncs.wait_ended(1, 60)
        machine = Machine(nvdimms=judge.nvdimms, smp=1, memory_mib=256)
        destination = self.bare(machine, shim=self.shim(), source=judge.bare)
        load(destination.vm, stream)
        destination.adopt()
        poll = Call(FLUSH, (drc_index(0), 1), 100_000, True, 100)
        (answer,) = destination.batch([poll], timeout_s=60)
        self.known_issue(
            "qemu-flush-error-after-save-lost",
            shows=answer.code == ReturnCode.H_SUCCESS,
            found=f"the source's sync failed after its flush was saved as "
            f"{'pending' if state.pending else 'completed'}; the destination answers {answer}",
        )
