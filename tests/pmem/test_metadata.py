# SPDX-License-Identifier: GPL-2.0-or-later
"""Labels and information blocks are user data: damaged or hostile ones never harm the kernel.

A DIMM may come from another machine, or its file from anybody. The metadata are changed in the
backing file while no driver is bound, and then read anew (drivers/nvdimm/label.c, namespace_devs.c,
pfn_devs.c, btt.c).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.labels.metadata import (
    BTT_INFO,
    INDEX,
    INFO_BYTES,
    INFO_OFFSET,
    LABEL,
    LABEL_BYTES,
    PFN_INFO,
    LabelArea,
    StoredNamespace,
    Structure,
)
from paprscm.labels.reprobe import Reprobed, reprobe
from paprscm.pmem.namespaces import NamespaceMode, create_namespace
from paprscm.pmem.regions import Region, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.backing_files import BackingFiles
from paprscm.vm.dimms import PMEM_OFF
from paprscm.vm.machine import MIB, Machine

FLIPS = 100
SIZE = 64 * MIB
HUGE = 0xFFFFFFFFFFFFF000
# Refusals; a DIMM with labels that contradict each other has no driver.
REFUSED = (
    r"probe with driver \w+ failed with error -\d+",
    r"probe of \S+ failed with error -\d+",
    r"nmem\d+: is disabled, failing probe",
    r"missing label for",
    r"error: conflicting extents for uuid",
)
WARNS_ISSUE = "linux-label-sector-size-warns"
# drivers/nvdimm/namespace_devs.c.
WARNS = re.compile(r"WARNING: .*pmem_sector_size\+")


@dataclass(frozen=True)
class Change:
    """One change of a structure.

    Attributes:
        what: for messages.
        offset: place of the structure in the backing file, bytes.
        data: its new content.
    """

    what: str
    offset: int
    data: bytes


class Metadata(PaprScmTest):
    """
    Base of the tests: a DIMM whose metadata change under the guest.

    :avocado: disable
    """

    timeout = 600

    def start(self) -> None:
        """Start a guest with a DIMM whose file outlives it."""
        self.files: BackingFiles = self.keep(PMEM_OFF)
        self.lost: list[str] = []
        self.restart()

    def restart(self) -> None:
        """Start a guest on the same file; the one before may be lost."""
        self.guest: Guest = self.boot(
            Machine(nvdimms=self.files.nvdimms()), allowed=(*REFUSED, WARNS.pattern)
        )
        self.region: Region = wait_for_region(self.guest, 0)

    @property
    def file(self) -> Path:
        """The backing file: the region, and the label area behind it."""
        return self.files.path(0)

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes of the backing file."""
        with self.file.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes of the backing file, which the guest sees at once."""
        with self.file.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def after(self, changes: Iterable[Change]) -> Reprobed | None:
        """Make changes, bind the drivers anew, and undo the changes.

        Returns:
            None: the guest did not survive; then there is another one, which has seen the changes
            undone.
        """
        changes = list(changes)
        before = [(change.offset, self.read(change.offset, len(change.data))) for change in changes]
        for change in changes:
            self.write(change.offset, change.data)
        found = None
        try:
            found = reprobe(self.guest, self.region)
        except ContractError as error:
            what = ", ".join(change.what for change in changes)
            self.lost.append(f"{what}: {error.message.splitlines()[0]}")
            self.guest.kill()
        for offset, data in before:
            self.write(offset, data)
        if found is None:
            self.restart()
        return found

    def plausible(self, what: str, found: Reprobed) -> None:
        """Check that all namespaces are in the region and apart from each other."""
        end = 0
        for one in sorted(found.namespaces, key=lambda one: one.offset):
            ok = one.offset >= end and one.offset + one.size_bytes <= self.region.size_bytes
            self.check(f"{what}: {one} is in the region, behind the one before", ok, True)
            end = one.offset + one.size_bytes

    def survived(self) -> None:
        """Check that no change has harmed a guest."""
        self.check("changes that the kernel did not survive", self.lost, [])


class LabelAreas(Metadata):
    """
    The label area.

    :avocado: tags=namespace
    """

    def start(self) -> None:
        """Make two namespaces, and a third one that only the older index block still lists."""
        super().start()
        for _ in range(3):
            last = create_namespace(self.guest, self.region, mode="raw", size_bytes=SIZE)
        self.guest.succeed(f"ndctl destroy-namespace -f {last.name}")
        self.place = self.region.size_bytes
        self.area = LabelArea.parse(self.read(self.place, PMEM_OFF.label_bytes))
        counts = sorted(len(self.area.namespaces(number)) for number in (0, 1))
        if counts != [2, 3] or len(self.area.namespaces()) != 2:
            raise HostError(f"the index blocks list {counts} namespaces, not 2 and 3")
        found = reprobe(self.guest, self.region)
        self.expect("namespaces that are read anew", found.namespaces, self.area.namespaces())

    def structures(self) -> list[tuple[str, int, int]]:
        """Name, offset in the area and size of each structure in use."""
        index = self.area.index_bytes
        slots = [
            (f"label {slot}", self.area.slot_offset(slot), LABEL_BYTES)
            for slot in self.area.used_slots()
        ]
        return [("index block 0", 0, index), ("index block 1", index, index), *slots]

    def test_flipped_bits(self) -> None:
        """A flipped bit costs no more than its label; the other index block stands in for its own.

        UEFI, NVDIMM Label Protocol: a structure with a wrong checksum does not count, and the
        intact index block with the later sequence number does.
        """
        self.start()
        random = self.random()
        structures = self.structures()
        shown = 0
        for number in range(FLIPS):
            name, offset, size = structures[number % len(structures)]
            bit = random.randrange(8 * size)
            place = offset + bit // 8
            flipped = bytes([self.area.data[place] ^ 1 << bit % 8])
            area = self.area.replaced(place, flipped)
            what = f"bit {bit} of {name}"
            found = self.after([Change(what, self.place + place, flipped)])
            if found is not None:
                self.check(f"{what}: namespaces", found.namespaces, area.namespaces())
                shown += found.namespaces != self.area.namespaces()
        self.metric("flips", FLIPS, "flips", changed=str(shown))
        self.expect("flips that cost a namespace", shown > 0, True)
        self.survived()
        self.works()

    def test_hostile_index(self) -> None:
        """Impossible values in both index blocks, with the right checksums, show no namespace.

        UEFI, NVDIMM Label Protocol, validation of an index block.
        """
        self.start()
        for field, values in {
            "labelsize": (2, 24, 57, 255),
            "nslot": (0x01000000, 0xFFFFFFFF, len(self.area.data) // LABEL_BYTES),
            "seq": (0, 0xFFFFFFFC),
            "myoff": (64, 1 << 63),
            "otheroff": (64, 1 << 63),
            "labeloff": (0, len(self.area.data), 1 << 63),
            "mysize": (0, 1 << 63),
        }.items():
            for value in values:
                found = self.after(self.both(field, value))
                if found is not None:
                    empty: frozenset[StoredNamespace] = frozenset()
                    self.check(f"{field} {value:#x}: namespaces", found.namespaces, empty)
        self.survived()
        self.works()

    def both(self, field: str, value: int) -> list[Change]:
        """A field of both index blocks changed."""
        return [
            Change(
                f"{field} {value:#x} in index block {number}",
                self.place + number * self.area.index_bytes,
                INDEX.changed(self.area.index(number), **{field: value}),
            )
            for number in (0, 1)
        ]

    def test_hostile_labels(self) -> None:
        """A label with impossible values and the right checksum yields no impossible namespace."""
        self.start()
        first, second = self.area.used_slots()[:2]
        dpa = LABEL.read(self.area.label(second), "dpa")
        identity = LABEL.read(self.area.label(second), "uuid")
        region = self.region.size_bytes
        for field, values in {
            "dpa": (1, dpa, dpa + 4096, region - 4096, region, HUGE, 1 << 63),
            "rawsize": (0, 1, 4096, SIZE + 4096, region, HUGE, 1 << 63),
            "slot": (second, 5, 0xFFFFFFFF),
            "nlabel": (0, 2, 0xFFFF),
            "position": (1, 0xFFFF),
            "flags": (1, 8, 0xFFFFFFFF),
            "lbasize": (1, 513, 1 << 63),
            "isetcookie": (0, 1),
            "uuid": (0, identity),
            "type_guid": (0, (1 << 128) - 1),
            "abstraction_guid": (1, (1 << 128) - 1),
            "align": (1, 63, 255),
        }.items():
            for value in values:
                what = f"{field} {value:#x} in label {first}"
                data = LABEL.changed(self.area.label(first), **{field: value})
                place = self.place + self.area.slot_offset(first)
                found = self.after([Change(what, place, data)])
                if found is not None:
                    self.plausible(what, found)
        self.survived()
        warnings = [line for line in self.guest.console.lines if WARNS.search(line)]
        self.works(Change("rawsize", place, LABEL.changed(self.area.label(first), rawsize=HUGE)))
        self.known_issue(
            WARNS_ISSUE,
            shows=bool(warnings),
            found=warnings[0] if warnings else "labels with a wrong sector size cause no warning",
        )

    def works(self, hostile: Change | None = None) -> None:
        """Check that the DIMM is as it was, and usable after its labels are erased.

        Args:
            hostile: a change that the labels have when they are erased.
        """
        found = reprobe(self.guest, self.region)
        self.check("namespaces at the end", found.namespaces, self.area.namespaces())
        if hostile is not None:
            self.write(hostile.offset, hostile.data)
            found = reprobe(self.guest, self.region)
            self.check("namespaces with a hostile label", len(found.namespaces) < 2, True)
        self.guest.succeed(f"ndctl disable-region {self.region.name}; ndctl zero-labels all")
        found = reprobe(self.guest, self.region)
        self.check("without labels", (found.namespaces, found.refused), (frozenset(), ()))
        disk = create_namespace(self.guest, self.region, mode="fsdax").disk
        self.guest.succeed(f"dd if=/dev/zero of={disk.path} bs=64k count=1 oflag=direct conv=fsync")


class InfoBlocks(Metadata):
    """
    The information block of a namespace.

    :avocado: tags=namespace
    """

    def judge(
        self, mode: NamespaceMode, layout: Structure, values: dict[str, tuple[int, ...]]
    ) -> None:
        """Change one field after the other; its disk is no larger than the namespace."""
        self.start()
        create_namespace(self.guest, self.region, mode=mode, size_bytes=SIZE)
        usual = reprobe(self.guest, self.region)
        (stored,) = usual.namespaces
        place = stored.offset + INFO_OFFSET
        info = self.read(place, INFO_BYTES)
        self.expect("the information block is intact", layout.is_intact(info), True)
        for field, field_values in values.items():
            for value in field_values:
                what = f"{field} {value:#x}"
                data = layout.changed(info, **{field: value})
                found = self.after([Change(what, place, data)])
                if found is not None:
                    self.plausible(what, found)
                    for device, size in found.devices.items():
                        fits = size <= stored.size_bytes
                        self.check(f"{what}: {device} of {size} bytes fits", fits, True)
        self.survived()
        found = reprobe(self.guest, self.region)
        self.check(
            "at the end", (found.namespaces, found.devices), (usual.namespaces, usual.devices)
        )

    def test_pfn(self) -> None:
        """An fsdax namespace whose block has impossible values is refused, or within its range."""
        self.judge(
            "fsdax",
            PFN_INFO,
            {
                "flags": (0xFFFFFFFF,),
                "version_major": (0, 2, 0xFFFF),
                "version_minor": (0, 1, 9, 0xFFFF),
                "dataoff": (0, 4096, SIZE - 65536, SIZE, HUGE, 1 << 63),
                "npfns": (0, 1, 1 << 32, HUGE),
                "mode": (0, 3, 0xFFFFFFFF),
                "start_pad": (4096, SIZE, 0xFFFF0000),
                "end_trunc": (4096, SIZE, 0xFFFF0000),
                "align": (0, 3, 4096, 1 << 30, 1 << 31),
                "page_size": (0, 4096, 1 << 31),
                "page_struct_size": (0, 1, 128, 0xFFFF),
                "parent_uuid": (1,),
            },
        )

    def test_btt(self) -> None:
        """A sector namespace whose block has impossible values is refused, or within its range."""
        self.judge(
            "sector",
            BTT_INFO,
            {
                "flags": (1, 0xFFFFFFFF),
                "version_major": (0, 2, 0xFFFF),
                "version_minor": (0, 9),
                "external_lbasize": (0, 1, 513, 8192, 0xFFFFFFFF),
                "external_nlba": (0, 1 << 30, 0xFFFFFFFF),
                "internal_lbasize": (0, 1, 513, 0xFFFFFFFF),
                "internal_nlba": (0, 1, 0xFFFFFFFF),
                "nfree": (0, 1, 1 << 20, 0xFFFFFFFF),
                "infosize": (0, 0xFFFFFFFF),
                "nextoff": (4096, SIZE // 2, HUGE, 1 << 63),
                "dataoff": (0, SIZE, HUGE, 1 << 63),
                "mapoff": (0, SIZE, HUGE, 1 << 63),
                "logoff": (0, SIZE, HUGE, 1 << 63),
                "info2off": (0, SIZE, HUGE, 1 << 63),
                "parent_uuid": (1,),
            },
        )
