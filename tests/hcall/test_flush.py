# SPDX-License-Identifier: GPL-2.0-or-later
"""H_SCM_FLUSH from bare metal: its tokens, its syncs on the host, and slow or failing syncs.

QEMU commit b5513584a08d ("spapr: nvdimm: Implement H_SCM_FLUSH hcall") (in v7.0), hw/ppc/
spapr_nvdimm.c: h_scm_flush, flush_worker_cb, spapr_nvdimm_get_flush_status. The flush shim counts
the host's syncs in QEMU's process, independently of QEMU's code.
"""

import dataclasses
import errno
import statistics

from paprscm.checks import at_least, containing
from paprscm.errors import HostError
from paprscm.hcall.judge import ScmJudge, counts_by_name, request
from paprscm.hcall.mailbox import Call
from paprscm.papr import BIND_ANY_ADDRESS, Hcall, ReturnCode, UnbindScope, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import OVERRIDE, PLAIN, PMEM_OFF, PMEM_ON, SMALL
from paprscm.vm.machine import Machine, Nvdimm, in_words
from paprscm.vm.shim_layout import FLUSHES
from paprscm.vm.vm import StartError

FLUSH = Hcall.H_SCM_FLUSH
# PAPR: loads and stores in real mode (Linux hvcall.h).
H_LOGICAL_CI_LOAD, H_LOGICAL_CI_STORE = 0x3C, 0x40
PATTERN = 0x8182838485868788
BUSY = ReturnCode.H_LONG_BUSY_ORDER_10_MSEC

FIRST = PMEM_OFF.at(0, SMALL)
SECOND = PMEM_OFF.at(1, SMALL)
PERSISTENT = PMEM_ON.at(2, SMALL)
OVERRIDDEN = OVERRIDE.at(3, SMALL)
OLD = PLAIN.at(4, SMALL)


class FlushTest(QemuTest):
    """Base of the tests of H_SCM_FLUSH."""

    def judge(self, *nvdimms: Nvdimm, smp: int = 1) -> ScmJudge:
        """Start a bare machine whose syncs are counted; return its judge."""
        machine = Machine(nvdimms=nvdimms, smp=smp, memory_mib=256)
        return ScmJudge(self.bare(machine, shim=self.shim()), nvdimms)

    def counts(self, judge: ScmJudge, slot: int) -> dict[str, int]:
        """Number of syncs of a DIMM's backing file, by operation; each covers the whole DIMM."""
        syncs = judge.bare.vm.syncs(slot)
        partial = syncs.partial(judge.model.dimms[slot].size_bytes)
        self.check(f"syncs of slot {slot} that omit a part of the DIMM", partial, [])
        ended = {operation.name.lower(): syncs.counts(operation).ended for operation in FLUSHES}
        return {name: count for name, count in ended.items() if count}


class Tokens(FlushTest):
    """
    The life of a continue token.

    :avocado: tags=hcall,flush
    """

    def test_life(self) -> None:
        """A flush is first long-busy, keeps its token, and reports its end exactly once."""
        judge = self.judge(FIRST)
        for number in range(1, 21):
            (begun,) = judge.make(request(FLUSH, FIRST.drc, 0))
            self.expect("code and token of a flush", (begun.code, begun.outputs[0]), (BUSY, number))
            judge.poll_to_the_end()
            judge.make(request(FLUSH, FIRST.drc, number), request(FLUSH, FIRST.drc, number + 1))
        self.check("syncs", self.counts(judge, 0), {"fdatasync": 20})
        self.measure("branches", counts_by_name(judge.model.covered))

    def test_tokens_are_the_devices_own(self) -> None:
        """Each DIMM counts its own tokens; a token of another DIMM, or an unused one, is H_P2."""
        judge = self.judge(FIRST, SECOND)
        judge.make(*(request(FLUSH, FIRST.drc, 0) for _ in range(3)))
        judge.make(request(FLUSH, SECOND.drc, 0))
        judge.make(
            *(request(FLUSH, SECOND.drc, token) for token in (2, 3)),
            *(request(FLUSH, FIRST.drc, token) for token in (4, 1 << 32 | 1, 1 << 63, -1)),
        )
        judge.poll_to_the_end()
        self.check("syncs of slot 0", self.counts(judge, 0), {"fdatasync": 3})
        self.check("syncs of slot 1", self.counts(judge, 1), {"fdatasync": 1})

    def test_many_outstanding(self) -> None:
        """A thousand concurrent flushes are a thousand syncs; each end is reported exactly once."""
        judge = self.judge(FIRST)
        judge.make(*(request(FLUSH, FIRST.drc, 0) for _ in range(1000)))
        judge.bare.vm.syncs(0).wait_ended(1000, 60)
        tokens = list(range(1, 1001))
        self.random().shuffle(tokens)
        polls = [Call(FLUSH, (FIRST.drc, token), 100_000, True, 100) for token in tokens]
        judge.judge([request(FLUSH, *poll.args) for poll in polls], judge.bare.batch(polls))
        judge.make(*(request(FLUSH, FIRST.drc, token) for token in tokens))
        self.check("syncs", self.counts(judge, 0), {"fdatasync": 1000})

    def test_four_processors(self) -> None:
        """Flushes that four vCPUs begin concurrently get distinct tokens, and each ends once."""
        judge = self.judge(FIRST, smp=4)
        bare, each = judge.bare, 250
        bare.start_cpus(4)
        begun = bare.together({cpu: [Call(FLUSH, (FIRST.drc, 0))] * each for cpu in range(4)})
        answers = [answer for results in begun.values() for answer in results]
        self.expect("codes of the flushes", {answer.code for answer in answers}, {BUSY})
        tokens = sorted(answer.outputs[0] for answer in answers)
        self.expect("the tokens count from 1", tokens == list(range(1, 4 * each + 1)), True)
        # Every vCPU polls every token: exactly one vCPU must get the flush's end.
        polls = [Call(FLUSH, (FIRST.drc, token), 100_000, True, 100) for token in tokens]
        ended = bare.together(dict.fromkeys(range(4), polls), timeout_s=60)
        codes = {
            tuple(sorted(results[n].code for results in ended.values())) for n in range(len(tokens))
        }
        once = (ReturnCode.H_P2,) * 3 + (ReturnCode.H_SUCCESS,)
        self.check("the vCPUs' codes for a token", codes, {once})
        self.check("syncs", self.counts(judge, 0), {"fdatasync": 4 * each})

    def test_reset_ends_and_forgets_flushes(self) -> None:
        """A reset of the machine forgets all tokens; later flushes get new ones."""
        judge = self.judge(FIRST, SECOND)
        judge.make(*(request(FLUSH, nvdimm.drc, 0) for nvdimm in (FIRST, SECOND, FIRST)))
        judge.bare.reset()
        judge.model.reset()
        for slot, count in ((0, 2), (1, 1)):
            self.check(f"syncs of slot {slot}", self.counts(judge, slot), {"fdatasync": count})
        judge.make(
            *(request(FLUSH, FIRST.drc, token) for token in (1, 2)),
            request(FLUSH, SECOND.drc, 1),
            request(FLUSH, FIRST.drc, 0),
            request(FLUSH, SECOND.drc, 0),
        )
        judge.poll_to_the_end()


class Syncs(FlushTest):
    """
    The host's syncs for a flush.

    :avocado: tags=hcall,flush
    """

    def test_each_kind(self) -> None:
        """A flush calls fdatasync on pmem=off, pmem_persist on pmem-override; others refuse it."""
        nvdimms = self.possible((FIRST, PERSISTENT, OVERRIDDEN, OLD))
        judge = self.judge(*nvdimms)
        for _ in range(5):
            judge.make(*(request(FLUSH, nvdimm.drc, 0) for nvdimm in nvdimms))
            judge.poll_to_the_end()
        expected = {FIRST: {"fdatasync": 5}, OVERRIDDEN: {"pmem_persist": 5}}
        for nvdimm in nvdimms:
            counts = self.counts(judge, nvdimm.slot)
            self.check(f"syncs of {in_words(nvdimm)}", counts, expected.get(nvdimm, {}))
        self.measure("branches", counts_by_name(judge.model.covered))

    def test_no_other_call_syncs(self) -> None:
        """Only H_SCM_FLUSH syncs a DIMM's data; calls that write labels or bind memory do not."""
        judge = self.judge(FIRST, OLD)
        for nvdimm in (FIRST, OLD):
            drc, address = nvdimm.drc, judge.model.dimms[nvdimm.slot].address
            answers = judge.make(
                request(Hcall.H_SCM_WRITE_METADATA, drc, 0, 1, 1),
                request(Hcall.H_SCM_READ_METADATA, drc, 0, 8),
                request(Hcall.H_SCM_BIND_MEM, drc, 0, 1, BIND_ANY_ADDRESS, 0),
                request(Hcall.H_SCM_UNBIND_MEM, drc, address, 1, 0),
                request(Hcall.H_SCM_UNBIND_ALL, UnbindScope.DRC, drc, 0),
                request(Hcall.H_SCM_HEALTH, drc),
            )
            codes = {answer.code for answer in answers}
            self.check(f"codes of {in_words(nvdimm)}", codes, {ReturnCode.H_SUCCESS})
            # A poll with an unused token does not sync, either.
            judge.make(request(FLUSH, drc, 99))
            self.check(f"syncs of {in_words(nvdimm)}", self.counts(judge, nvdimm.slot), {})

    def stored_and_flushed(self, nvdimm: Nvdimm) -> bytes:
        """Store eight bytes at a DIMM's start, flush, and return the first bytes of its file."""
        judge = self.judge(nvdimm)
        address = judge.model.dimms[nvdimm.slot].address
        stored = judge.bare.call(H_LOGICAL_CI_STORE, 8, address, PATTERN)
        self.expect("code of H_LOGICAL_CI_STORE", stored.code, 0)
        loaded = judge.bare.call(H_LOGICAL_CI_LOAD, 8, address)
        self.expect("code and value of a load", (loaded.code, loaded.outputs[0]), (0, PATTERN))
        judge.make(request(FLUSH, nvdimm.drc, 0))
        judge.poll_to_the_end()
        with judge.bare.file(nvdimm.slot).open("rb") as file:
            return file.read(8)

    def test_what_was_stored_is_in_the_file(self) -> None:
        """When a flush has ended, data stored before it are in the file."""
        content = self.stored_and_flushed(FIRST)
        self.check("the file's first bytes", content, PATTERN.to_bytes(8, "big"))

    def test_a_private_mapping_loses_what_was_stored(self) -> None:
        """With share=off, too, H_SUCCESS of a flush means that the data are in the file."""
        try:
            content = self.stored_and_flushed(dataclasses.replace(FIRST, share=False))
        except StartError as error:
            if not error.refused:
                raise
            # The control: nothing else is refused.
            self.judge(FIRST)
            self.known_issue("qemu-nvdimm-share-off", shows=False, found="QEMU refuses it")
            return
        lost = content != PATTERN.to_bytes(8, "big")
        self.known_issue(
            "qemu-nvdimm-share-off",
            shows=lost,
            found=f"after H_SUCCESS of a flush the file holds {content.hex()}",
        )

    def test_told_only_after_its_sync(self) -> None:
        """While a sync hangs, each poll returns long-busy, and other DIMMs can be flushed."""
        judge = self.judge(FIRST, SECOND)
        held = judge.bare.vm.syncs(0)
        judge.hold(0)
        judge.make(*(request(FLUSH, FIRST.drc, 0) for _ in range(3)))
        held.wait_begun(3)
        for _ in range(20):
            judge.make(*(request(FLUSH, FIRST.drc, token) for token in (1, 2, 3)))
            judge.make(request(FLUSH, SECOND.drc, 0))
            judge.poll_to_the_end(1)
        self.check("syncs that ended while they were held", held.counts().ended, 0)
        judge.release(0)
        judge.poll_to_the_end()
        self.check("syncs of slot 0", self.counts(judge, 0), {"fdatasync": 3})
        flushes = judge.model.dimms[1].last_token
        self.check("syncs of slot 1", self.counts(judge, 1), {"fdatasync": flushes})

    def test_other_dimm_while_a_worker_is_idle(self) -> None:
        """A sync that hangs does not delay a flush of another DIMM that begins at the same time."""
        judge = self.judge(FIRST, SECOND)
        waiting = 0
        for number in range(40):
            # As many of QEMU's worker threads are idle after this, and each takes one flush.
            flushes = [request(FLUSH, FIRST.drc, 0)] * (number % 8 + 1)
            judge.hold(0)
            judge.make(*flushes)
            judge.release(0)
            judge.poll_to_the_end()
            judge.hold(0)
            judge.make(*flushes, request(FLUSH, SECOND.drc, 0))
            token = judge.model.dimms[1].last_token
            poll = Call(FLUSH, (SECOND.drc, token), 20_000, True, 100)
            (answer,) = judge.bare.batch([poll], timeout_s=60)
            judge.release(0)
            judge.judge([request(FLUSH, *poll.args)], [answer])
            judge.poll_to_the_end()
            if answer.code == BUSY:
                waiting = answer.count
                break
        # A race that shows in most runs, so that a run without it proves nothing.
        if waiting:
            self.known_issue(
                "qemu-thread-pool-waits-for-hung-request",
                shows=True,
                found=f"a flush of slot 1 was long-busy for {waiting} polls while slot 0's hung",
            )

    def test_a_slow_sync_is_waited_for(self) -> None:
        """The end of a flush is not reported before its sync has ended; metric: its latency."""
        judge = self.judge(FIRST)
        flush = Call(FLUSH, (FIRST.drc, 0), 100_000, True, 100)
        for sync_s, count in ((0, 200), (0.01, 20), (0.05, 5)):
            judge.bare.vm.syncs(0).delay(sync_s)
            ended = judge.bare.batch([flush] * count)
            self.check("codes of the flushes", {a.code for a in ended}, {ReturnCode.H_SUCCESS})
            durations_s = [answer.duration_s for answer in ended]
            self.check("duration of the shortest flush, s", min(durations_s), at_least(sync_s))
            self.metric("latency", statistics.median(durations_s), "s", sync_s=f"{sync_s:g}")
        self.check("syncs", self.counts(judge, 0), {"fdatasync": 225})

    def test_a_failed_sync_is_told(self) -> None:
        """When a host sync fails, its flush ends with H_HARDWARE, and no other flush does."""
        judge = self.judge(FIRST, SECOND)
        syncs, first = judge.bare.vm.syncs(0), judge.model.dimms[0]
        for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            syncs.fail(number)
            first.failing = True
            judge.make(*(request(FLUSH, FIRST.drc, 0) for _ in range(3)))
            judge.make(request(FLUSH, SECOND.drc, 0))
            judge.poll_to_the_end()
            syncs.clear()
            first.failing = False
            judge.make(request(FLUSH, FIRST.drc, 0))
            judge.poll_to_the_end()
        self.check("syncs that failed", syncs.counts().failed, 9)
        output = judge.bare.vm.output()
        for text in ("Input/output error", "No space left on device", "Disk quota exceeded"):
            message = f"papr_scm: Could not sync nvdimm to backend file: {text}"
            self.check("QEMU's output", output, containing(message))

    def test_one_of_many_fails(self) -> None:
        """Of a hundred concurrent flushes, exactly those with a failed sync fail."""
        judge = self.judge(FIRST)
        syncs = judge.bare.vm.syncs(0)
        syncs.fail(errno.EIO, every=7)
        begun = judge.bare.batch([Call(FLUSH, (FIRST.drc, 0))] * 100)
        ended = judge.bare.batch(
            [Call(FLUSH, (FIRST.drc, answer.outputs[0]), 100_000, True, 100) for answer in begun]
        )
        codes = [answer.code for answer in ended]
        failed = 100 // 7
        self.check("flushes with H_HARDWARE", codes.count(ReturnCode.H_HARDWARE), failed)
        self.check("flushes with H_SUCCESS", codes.count(ReturnCode.H_SUCCESS), 100 - failed)
        self.check("syncs that failed", syncs.counts().failed, failed)

    def test_every_branch(self) -> None:
        """H_SCM_FLUSH can return each of its result codes."""
        nvdimms = self.possible((FIRST, PERSISTENT, OVERRIDDEN, OLD))
        judge = self.judge(*nvdimms)
        held = judge.bare.vm.syncs(0)
        judge.hold(0)
        judge.make(*(request(FLUSH, nvdimm.drc, token) for nvdimm in nvdimms for token in (0, 1)))
        judge.release(0)
        judge.poll_to_the_end()
        held.fail(errno.EIO)
        judge.model.dimms[0].failing = True
        judge.make(request(FLUSH, FIRST.drc, 0), request(FLUSH, drc_index(9), 0))
        judge.poll_to_the_end()
        judge.make(request(FLUSH, FIRST.drc, 1))
        self.measure("branches", counts_by_name(judge.model.covered))
        without = [] if PERSISTENT in nvdimms else ["persistent backend"]
        if missing := judge.missing([FLUSH], without=without):
            raise HostError(f"branches that the test did not reach: {', '.join(sorted(missing))}")
