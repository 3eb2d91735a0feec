# SPDX-License-Identifier: GPL-2.0-or-later
"""Every branch of every storage class memory hcall, from bare metal, compared with a model.

No kernel runs: every difference is QEMU's (hw/ppc/spapr_nvdimm.c). The model is
paprscm/hcall/model.py; its docstrings cite the source of each rule.
"""

import itertools
import random
from collections.abc import Iterable, Iterator

from paprscm.errors import GuestLostError, HostError
from paprscm.hcall.judge import Request, ScmJudge, counts_by_name, request, unbind_wraps
from paprscm.papr import BIND_ANY_ADDRESS, SCM_BLOCK_SIZE, Hcall, UnbindScope, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import OVERRIDE, PMEM_OFF, SMALL
from paprscm.vm.machine import MIB, Machine, Nvdimm

KINDS = (
    PMEM_OFF.at(0),
    Nvdimm(slot=1, pmem=True, size_bytes=768 * MIB, label_bytes=256 << 10),
    OVERRIDE.at(2),
    Nvdimm(slot=3, device="nvdimm", label_bytes=192 << 10),
    Nvdimm(slot=6, unarmed=True, size_bytes=256 * MIB),
)
EMPTY_SLOT = 5

# Limits of 32 and 64 bits, and values that are negative as signed numbers.
EDGES = (
    *(0, 1, 2, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 1),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1),
)

# DRC indices of a CPU core, a PCI host bridge, a PCI slot and memory, which may exist, and indices
# of no connector (QEMU spapr_drc.h:SpaprDRConnectorTypeShift).
NO_NVDIMMS = (
    drc_index(EMPTY_SLOT),
    *(drc_index(0) + 8, drc_index(0) + 0x0FFFFFFF),
    *(0x10000000, 0x20000000, 0x40000000, 0x80000000, 0x80000001),
    *(0, 1, 0x30000000, 0x50000000, 0xA0000000, 0xFFFFFFFF),
)


def around(value: int, by: int = 9) -> range:
    """The non-negative numbers near `value`."""
    return range(max(0, value - by), value + by + 1)


class HcallTest(QemuTest):
    """Base of the tests of hcalls."""

    def judge(self, *kinds: Nvdimm) -> ScmJudge:
        """Start a bare machine with the DIMMs that this QEMU supports; return its judge."""
        able = self.possible(kinds)
        bare = self.bare(Machine(nvdimms=able, smp=1, memory_mib=256))
        return ScmJudge(bare, able)

    def dies_of(self, signal: str, judge: ScmJudge, *requests: Request) -> str:
        """Make the calls; return the message of QEMU's death by this signal, or ""."""
        try:
            judge.make(*requests)
        except GuestLostError as error:
            if signal not in error.message:
                raise
            return error.message
        return ""

    def covers(self, judge: ScmJudge, *calls: Hcall, without: Iterable[str] = ()) -> None:
        """Check that the test took every branch of these calls."""
        self.metric("hcalls", judge.calls, "hcalls")
        self.measure("branches", counts_by_name(judge.model.covered))
        if missing := judge.missing(calls, without=without):
            raise HostError(f"branches that the test did not reach: {', '.join(sorted(missing))}")


class Metadata(HcallTest):
    """
    H_SCM_READ_METADATA and H_SCM_WRITE_METADATA.

    :avocado: tags=hcall
    """

    def places(self, label_bytes: int) -> Iterator[tuple[int, int]]:
        """(offset, length) at every edge of the label area and of the registers."""
        offsets = {*around(0), *around(label_bytes // 2, 8), *around(label_bytes)}
        offsets |= {edge for value in EDGES for edge in around(value) if edge < 1 << 64}
        return itertools.product(sorted(offsets), (*range(10), 16, *EDGES[3:]))

    def fill(self, judge: ScmJudge, chance: random.Random) -> None:
        """Write random bytes into every label area and into the model."""
        for slot, dimm in judge.model.dimms.items():
            dimm.label[:] = chance.randbytes(len(dimm.label))
            with judge.bare.file(slot).open("r+b") as file:
                file.seek(dimm.size_bytes)
                file.write(dimm.label)

    def test_read(self) -> None:
        """H_SCM_READ_METADATA returns the backing file's bytes, or the argument's error code."""
        judge = self.judge(*KINDS)
        self.fill(judge, self.random())
        for slot, dimm in judge.model.dimms.items():
            judge.make(
                *(
                    request(Hcall.H_SCM_READ_METADATA, drc_index(slot), offset, length)
                    for offset, length in self.places(len(dimm.label))
                ),
                *(request(Hcall.H_SCM_READ_METADATA, drc, 0, 8) for drc in NO_NVDIMMS),
            )
        self.covers(judge, Hcall.H_SCM_READ_METADATA)

    def test_read_four_bytes(self) -> None:
        """H_SCM_READ_METADATA of 4 bytes always clears the upper half of r4."""
        judge = self.judge(KINDS[0])
        drc, word = KINDS[0].drc, 0x80000001
        judge.make(
            request(Hcall.H_SCM_WRITE_METADATA, drc, 0, word, 4),
            request(Hcall.H_SCM_READ_METADATA, drc, 0, 4),
        )
        issue = "qemu-read-metadata-sign-extends"
        wrong = judge.known_wrong.get(issue)
        self.known_issue(issue, shows=bool(wrong), found=wrong or f"r4 is {word:#x}")

    def test_write(self) -> None:
        """H_SCM_WRITE_METADATA changes exactly the named bytes of the backing file."""
        judge, chance = self.judge(*KINDS), self.random()
        self.fill(judge, chance)
        for slot, dimm in judge.model.dimms.items():
            requests = []
            for offset, length in self.places(len(dimm.label)):
                fitting = chance.getrandbits(8 * min(length, 8))
                wide = 1 << min(63, 8 * length)
                for data in (fitting, wide, wide - 1, (1 << 64) - 1):
                    requests.append(
                        request(Hcall.H_SCM_WRITE_METADATA, drc_index(slot), offset, data, length)
                    )
            chance.shuffle(requests)
            judge.make(*requests)
            judge.make(
                *(request(Hcall.H_SCM_WRITE_METADATA, drc, 0, 0, 8) for drc in NO_NVDIMMS),
                *(
                    request(Hcall.H_SCM_READ_METADATA, drc_index(slot), offset, length)
                    for offset, length in self.places(len(dimm.label))
                ),
            )
        for slot, dimm in judge.model.dimms.items():
            with judge.bare.file(slot).open("rb") as file:
                file.seek(dimm.size_bytes - 4096)
                untouched, label = file.read(4096) == bytes(4096), file.read() == dimm.label
                self.check(
                    f"slot {slot}: the data area before the labels is empty", untouched, True
                )
                self.check(f"slot {slot}: the label area is the model's", label, True)
        self.covers(judge, Hcall.H_SCM_WRITE_METADATA, without=["read-only backend"])

    def test_write_to_a_read_only_backend(self) -> None:
        """H_SCM_WRITE_METADATA on a read-only backend returns H_P2, and does not end QEMU."""
        nvdimm = Nvdimm(slot=0, unarmed=True, read_only=True)
        judge = self.judge(nvdimm)
        judge.model.dimms[0].read_only = True
        crash = self.dies_of(
            "SIGSEGV",
            judge,
            request(Hcall.H_SCM_WRITE_METADATA, nvdimm.drc, 0, 1, 1),
            request(Hcall.H_SCM_WRITE_METADATA, nvdimm.drc, 0, 1 << 8, 1),
            request(Hcall.H_SCM_READ_METADATA, nvdimm.drc, 0, 1),
        )
        self.measure("branches", counts_by_name(judge.model.covered))
        self.known_issue(
            "qemu-label-write-to-read-only-backend", shows=bool(crash), found=crash or "H_P2"
        )


class Binding(HcallTest):
    """
    H_SCM_BIND_MEM, H_SCM_UNBIND_MEM, H_SCM_UNBIND_ALL.

    :avocado: tags=hcall
    """

    def test_bind(self) -> None:
        """H_SCM_BIND_MEM returns the address of a range of blocks, or the argument's error code."""
        judge = self.judge(*KINDS)
        call, anywhere = Hcall.H_SCM_BIND_MEM, BIND_ANY_ADDRESS
        for slot, dimm in judge.model.dimms.items():
            drc = drc_index(slot)
            blocks = (*range(dimm.blocks + 3), *EDGES)
            judge.make(
                *(request(call, drc, a, n, anywhere, 0) for a in blocks for n in blocks),
                *(request(call, drc, 0, 1, a, 0) for a in (*EDGES, dimm.address)),
                *(request(call, drc, 0, 1, anywhere, token) for token in EDGES),
                # With two wrong arguments, the error of the first one is part of the contract.
                *(request(call, drc, 99, 99, 0, token) for token in (0, 1)),
                *(request(call, other, 0, 1, anywhere, 0) for other in NO_NVDIMMS),
            )
        self.covers(judge, call)

    def test_unbind(self) -> None:
        """H_SCM_UNBIND_MEM accepts each range of blocks of its DIMM, and refuses all others."""
        judge = self.judge(*KINDS)
        call = Hcall.H_SCM_UNBIND_MEM
        for slot, dimm in judge.model.dimms.items():
            drc = drc_index(slot)
            starts = {dimm.address + n * SCM_BLOCK_SIZE for n in range(-2, dimm.blocks + 2)}
            starts |= {near for start in list(starts) for near in around(start, 1)}
            starts |= {0, SCM_BLOCK_SIZE, 1 << 32, 1 << 63, (1 << 64) - SCM_BLOCK_SIZE}
            # 2^36 blocks are 2^64 bytes: the product is 0, or something small.
            counts = (*range(dimm.blocks + 2), (1 << 36) - 1, 1 << 36, (1 << 36) + 1, *EDGES)
            requests = [request(call, drc, start, n, 0) for start in starts for n in counts]
            judge.make(
                *(each for each in requests if not unbind_wraps(each)),
                *(request(call, drc, dimm.address, 1, token) for token in EDGES),
                *(request(call, drc, 1, 0, token) for token in (0, 1)),
                *(request(call, other, dimm.address, 1, 0) for other in NO_NVDIMMS),
            )
        self.covers(judge, call, without=["range wraps"])

    def test_unbind_a_range_that_wraps(self) -> None:
        """H_SCM_UNBIND_MEM of blocks that end beyond 2^64 is refused, and does not end QEMU."""
        judge = self.judge(KINDS[0])
        start = (1 << 64) - SCM_BLOCK_SIZE
        wraps = request(Hcall.H_SCM_UNBIND_MEM, drc_index(0), start, 2, 0)
        crash = self.dies_of("SIGABRT", judge, wraps)
        self.known_issue("qemu-unbind-mem-aborts", shows=bool(crash), found=crash or "H_P3")

    def test_unbind_all(self) -> None:
        """H_SCM_UNBIND_ALL returns the blocks of one or all DIMMs, or an argument's error code."""
        judge = self.judge(*KINDS)
        call = Hcall.H_SCM_UNBIND_ALL
        judge.make(
            *(
                request(call, scope, drc, token)
                for scope in (UnbindScope.ALL, UnbindScope.DRC, 3, *EDGES)
                for drc in (*map(drc_index, judge.model.dimms), *NO_NVDIMMS)
                for token in (0, 1, 1 << 32, (1 << 64) - 1)
            )
        )
        self.covers(judge, call)


class Others(HcallTest):
    """
    H_SCM_HEALTH, DRC indices, and hcalls that QEMU does not implement.

    :avocado: tags=hcall
    """

    def test_health(self) -> None:
        """H_SCM_HEALTH reports only whether a DIMM is armed; its mask has no other bit."""
        judge = self.judge(*KINDS)
        drcs = (*map(drc_index, judge.model.dimms), *NO_NVDIMMS)
        judge.make(*(request(Hcall.H_SCM_HEALTH, drc) for drc in drcs))
        self.covers(judge, Hcall.H_SCM_HEALTH)

    def test_not_implemented(self) -> None:
        """Queries of bindings and of statistics return H_FUNCTION, as Linux expects."""
        judge = self.judge(*KINDS)
        calls = (
            Hcall.H_SCM_QUERY_BLOCK_MEM_BINDING,
            Hcall.H_SCM_QUERY_LOGICAL_MEM_BINDING,
            Hcall.H_SCM_PERFORMANCE_STATS,
        )
        drcs = (drc_index(0), drc_index(EMPTY_SLOT))
        judge.make(*(request(call, drc, 0, 0, 0) for call in calls for drc in drcs))
        self.covers(judge, *calls)

    def test_drc_index_has_32_bits(self) -> None:
        """Every call ignores the upper 32 bits of the DRC index."""
        judge = self.judge(*KINDS)
        drcs = [high << 32 | drc_index(0) for high in (1, 0x90000000, 0xFFFFFFFF)]
        judge.make(
            *(request(Hcall.H_SCM_HEALTH, drc) for drc in drcs),
            *(request(Hcall.H_SCM_READ_METADATA, drc, 0, 8) for drc in drcs),
            *(request(Hcall.H_SCM_WRITE_METADATA, drc, 0, 0, 8) for drc in drcs),
            *(request(Hcall.H_SCM_BIND_MEM, drc, 0, 1, BIND_ANY_ADDRESS, 0) for drc in drcs),
            *(request(Hcall.H_SCM_UNBIND_ALL, UnbindScope.DRC, drc, 0) for drc in drcs),
            *(request(Hcall.H_SCM_FLUSH, drc, 0) for drc in drcs),
        )
        judge.poll_to_the_end()
        self.check("token of the last flush", judge.model.dimms[0].last_token, len(drcs))

    def test_other_connectors_are_no_nvdimms(self) -> None:
        """The DRC index of memory, a core or a host bridge is refused, because it has no NVDIMM."""
        judge = self.judge(*KINDS)
        qmp = judge.bare.qmp
        qmp.execute("object-add", qom_type="memory-backend-ram", id="ram1", size=256 * MIB)
        qmp.execute("device_add", driver="pc-dimm", id="dimm1", memdev="ram1")
        (dimm,) = (
            device["data"]
            for device in qmp.execute("query-memory-devices")
            if device["type"] == "dimm"
        )
        memory = 0x80000000 + dimm["addr"] // SCM_BLOCK_SIZE
        for drc in (memory, drc_index(dimm["slot"]), *NO_NVDIMMS):
            judge.make(
                request(Hcall.H_SCM_READ_METADATA, drc, 0, 8),
                request(Hcall.H_SCM_WRITE_METADATA, drc, 0, 0, 8),
                request(Hcall.H_SCM_BIND_MEM, drc, 0, 1, BIND_ANY_ADDRESS, 0),
                request(Hcall.H_SCM_UNBIND_MEM, drc, dimm["addr"], 1, 0),
                request(Hcall.H_SCM_UNBIND_ALL, UnbindScope.DRC, drc, 0),
                request(Hcall.H_SCM_HEALTH, drc),
                request(Hcall.H_SCM_FLUSH, drc, 0),
                request(Hcall.H_SCM_FLUSH, drc, 1),
            )

    def test_hotplugged(self) -> None:
        """A DIMM that is plugged into a running machine works like one present at boot."""
        at_boot, later = PMEM_OFF.at(0), PMEM_OFF.at(EMPTY_SLOT, SMALL)
        judge = self.judge(at_boot)
        everything = [
            request(call, later.drc, 0, 1, BIND_ANY_ADDRESS if call is Hcall.H_SCM_BIND_MEM else 1)
            for call in Hcall
            if call is not Hcall.H_SCM_UNBIND_ALL
        ]
        judge.make(*everything)
        judge.bare.plug(later)
        judge = ScmJudge(judge.bare, (at_boot, later))
        judge.make(*everything, request(Hcall.H_SCM_FLUSH, later.drc, 0))
        judge.poll_to_the_end()
        judge.make(*(request(Hcall.H_SCM_HEALTH, drc_index(slot)) for slot in range(8)))
