# SPDX-License-Identifier: GPL-2.0-or-later
"""Migration to a machine with other DIMMs: refused with a reason, or everything works.

After a refusal the source goes on. A destination that accepts a machine whose DIMMs then do not
work has not kept the contract; which differences QEMU must detect is not written anywhere, so
both ends are allowed.
"""

from dataclasses import dataclass, replace

from paprscm.checks import containing
from paprscm.errors import ContractError, GuestLostError
from paprscm.hcall.judge import ScmJudge, request
from paprscm.migration.handover import hand_over
from paprscm.migration.transfer import LoadError
from paprscm.papr import BIND_ANY_ADDRESS, SCM_BLOCK_SIZE, Hcall, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import PLAIN, PMEM_OFF, PMEM_ON, SMALL
from paprscm.vm.machine import GIB, Machine, Nvdimm

FLUSH = Hcall.H_SCM_FLUSH

FIRST = PMEM_OFF.at(0, SMALL)
SECOND = PMEM_OFF.at(1, SMALL)
FOURTH = PMEM_OFF.at(3, SMALL)
DOUBLE = PMEM_OFF.at(0, 2 * SMALL)
PERSISTENT = PMEM_ON.at(1, SMALL)
OTHER_UUID = replace(FIRST, uuid="7f9b6a0e-52f5-4d0a-8d5c-0c3f1f0b9a11")
# The same file with another border between data and labels.
LARGE_LABEL = replace(FIRST, label_bytes=FIRST.label_bytes + SCM_BLOCK_SIZE)


@dataclass(frozen=True)
class Row:
    """A migration between different machines.

    Attributes:
        name: the difference.
        source, destination: the DIMMs of both, in the order of the command line.
        reason: text of QEMU's refusal in the versions seen; "": it accepts.
        slots: number of slots of the destination.
    """

    name: str
    source: tuple[Nvdimm, ...]
    destination: tuple[Nvdimm, ...]
    reason: str = ""
    slots: int = 8


REFUSED = (
    Row("a DIMM is missing", (FIRST, SECOND), (FIRST,), 'Unknown ramblock "mem1"'),
    Row("another size", (FIRST,), (DOUBLE,), "Size mismatch: mem0"),
    Row("another type", (FIRST,), (PLAIN.at(0, SMALL),), "'spapr_nvdimm_states' 0"),
)
HARMLESS = (
    Row("nothing", (FIRST, SECOND), (FIRST, SECOND)),
    Row("one more DIMM", (FIRST,), (FIRST, SECOND)),
    Row("another uuid", (FIRST,), (OTHER_UUID,)),
)
# Where QEMU puts DIMMs of 256 MiB in a machine with 256 MiB of memory.
PLACED = tuple(
    replace(dimm, address=GIB + slot * SMALL)
    for slot, dimm in enumerate((FIRST, SECOND, PERSISTENT))
)
ORDER = (
    Row("another order", PLACED[:2], PLACED[1::-1]),
    Row("another order, different modes", (PLACED[0], PLACED[2]), (PLACED[2], PLACED[0])),
)
MOVED = tuple(
    replace(dimm, number=1 - dimm.slot, address=GIB + (1 - dimm.slot) * SMALL)
    for dimm in (FIRST, SECOND)
)
PLACEMENT = (
    Row("another order without addr=", (FIRST, SECOND), (SECOND, FIRST)),
    Row("another slot", (FIRST,), (replace(SECOND, number=0),)),
    Row("two slots exchanged", (FIRST, SECOND), MOVED[::-1]),
    Row("another label size", (DOUBLE,), (LARGE_LABEL,)),
)
# Pending flushes have the DRC index of their slot.
SLOT = (PLACEMENT[1], Row("fewer slots", (FOURTH,), (replace(FIRST, number=3),), slots=1))


class Inventory(QemuTest):
    """
    :avocado: tags=hcall,flush,migration
    """

    def try_row(self, row: Row, *, flushes: int) -> str:
        """Migrate; return "works", or a description of what happens instead.

        Args:
            row: the machines.
            flushes: pending flushes of each DIMM that has them; one more for each higher slot.
        """
        dimms = self.keep(*row.source).nvdimms()
        machine = Machine(nvdimms=dimms, smp=1, memory_mib=256)
        judge = ScmJudge(self.bare(machine, shim=self.shim()), dimms)
        held = [dimm.slot for dimm in dimms if dimm.flushes_by_hcall and flushes]
        judge.hold(*held)
        for slot in held:
            judge.make(*[request(FLUSH, drc_index(slot), 0)] * (flushes + slot))
        # A DIMM's file goes with its number.
        files = {dimm.memdev: dimm.file for dimm in dimms}
        new = tuple(
            replace(dimm, file=file if file and file.stat().st_size == dimm.file_bytes else None)
            for dimm in row.destination
            for file in (files.get(dimm.memdev),)
        )
        target = Machine(nvdimms=new, slots=row.slots, smp=1, memory_mib=256)
        # Of a moved DIMM, the shim has the syncs under another slot.
        destination = self.bare(target, shim=self.shim(), source=judge.bare)
        slots = {dimm.slot for dimm in row.destination}
        result = "works"
        try:
            handover = hand_over(judge, destination, held=[slot for slot in held if slot in slots])
            self.use(handover.judge)
            handover.judge.release(*held)
            if wrong := handover.finish():
                result = f"accepted, then {wrong[0]}"
        except LoadError as error:
            result = f"refused: {error.text}"
            if not error.is_refusal:
                result = "not refused in order: " + error.how
        except (GuestLostError, ContractError) as error:
            result = f"accepted, then {error.message}"
        destination.close()
        # The source goes on.
        judge.bare.go_on()
        judge.release(*held)
        judge.poll_to_the_end()
        judge.bare.close()
        return result.replace("\n", " ")

    def use(self, judge: ScmJudge) -> None:
        """Make all calls that the source's DIMMs permit, with the source's DRC indices."""
        for slot, dimm in judge.model.dimms.items():
            drc, blocks = drc_index(slot), dimm.blocks
            judge.make(
                *(request(FLUSH, drc, token) for token in sorted(dimm.outstanding)),
                request(Hcall.H_SCM_HEALTH, drc),
                # The address of the end: a kernel that binds the whole DIMM knows no flush.
                request(Hcall.H_SCM_BIND_MEM, drc, blocks, 0, BIND_ANY_ADDRESS, 0),
                request(Hcall.H_SCM_READ_METADATA, drc, 0, 8),
            )

    def judge_issue(self, issue: str, rows: tuple[Row, ...], flushes: int) -> None:
        """Report a known issue if a row neither works nor is refused."""
        found = []
        for row in rows:
            result = self.try_row(row, flushes=flushes)
            self.log.info("%s: %s", row.name, result)
            if result != "works" and not result.startswith("refused"):
                found.append(f"{row.name}: {result[:120]}")
        self.known_issue(issue, shows=bool(found), found="; ".join(found))

    def test_refused(self) -> None:
        """A destination without a DIMM, or with another size or type, refuses and names it."""
        for row in REFUSED:
            result = self.try_row(row, flushes=2)
            self.check(row.name, result, containing("refused"))
            self.usual(f"the reason names {row.reason}", row.reason in result, True)

    def test_harmless(self) -> None:
        """Properties that the guest does not use may differ; all of its calls work as before."""
        for row in HARMLESS:
            for flushes in (0, 2):
                self.check(row.name, self.try_row(row, flushes=flushes), "works")

    def test_order(self) -> None:
        """Each DIMM gets its own flush state, in whatever order the devices are created."""
        self.judge_issue("qemu-flush-state-by-order", ORDER, flushes=2)

    def test_placement(self) -> None:
        """A destination refuses a DIMM with another slot, address or label size."""
        self.judge_issue("qemu-nvdimm-placement-not-migrated", PLACEMENT, flushes=0)

    def test_slot_with_pending_flushes(self) -> None:
        """A destination without the DIMM of a pending flush refuses the machine."""
        self.judge_issue("qemu-flush-state-unchecked", SLOT, flushes=2)
