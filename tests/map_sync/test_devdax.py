# SPDX-License-Identifier: GPL-2.0-or-later
"""Contract of a devdax device: MAP_SYNC, refused mappings, and stores that reach the DIMM.

drivers/dax/device.c (check_vma, dax_mmap, dax_fops) and drivers/dax/bus.c (devm_create_dev_dax:
set_dax_synchronous). Without a file system there are only stores and cache-line write-backs, so the
device must not grant MAP_SYNC where only a flush by hcall makes stores persistent.
"""

import dataclasses
import errno
import os
from collections.abc import Iterable

from paprscm.errors import CapabilityError, ContractError
from paprscm.guest.guest import Guest
from paprscm.map_sync.mmap_report import Cell, CellReport
from paprscm.map_sync.mmap_table import (
    CELLS,
    RANGES,
    SF,
    FileKind,
    at_offsets,
    expected_answer,
    table_differences,
)
from paprscm.map_sync.probe import map_sync_cells
from paprscm.map_sync.verdict import MapResult
from paprscm.pmem.namespaces import CharacterDevice, create_namespace, file_offset
from paprscm.pmem.regions import Region, read_page_size, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, PMEM_ON
from paprscm.vm.machine import Machine, Nvdimm

# Message of check_vma for a refused mapping, with the name of its caller: dax_mmap, or
# dax_mmap_prepare in 7.2.
REFUSAL = r"^device_dax dax[0-9.]+: \S+ \w+: fail, (?:attempted private mapping|unaligned vma)"


def prove(reports: Iterable[CellReport]) -> None:
    """Raise ContractError unless each cell was tried on a DAX character device."""
    kinds = {(report.file.type, report.file.dax) if report.file else None for report in reports}
    if kinds != {("character", True)}:
        raise ContractError(f"the file is not a DAX character device: {kinds}")


class OnHost:
    """Content of a devdax device in the DIMM's backing file on the host."""

    def __init__(self, guest: Guest, region: Region, device: CharacterDevice) -> None:
        self._begin = file_offset(guest, region, device)
        self._file = guest.file(region.slot)

    def absent(self, report: CellReport, *, shift: int = 0) -> list[int]:
        """The offsets of stores that are missing in the backing file.

        Args:
            report: result of a cell whose stores succeeded.
            shift: added to each offset, bytes.
        """
        with self._file.open("rb") as file:
            return [
                offset
                for offset, value in report.stored().items()
                if os.pread(file.fileno(), len(value), self._begin + offset + shift) != value
            ]


class Devdax(PaprScmTest):
    """
    A devdax namespace of a whole DIMM.

    :avocado: tags=map_sync
    """

    def device(self, guest: Guest, nvdimm: Nvdimm) -> tuple[Region, CharacterDevice]:
        """Create a devdax namespace on the DIMM; return its region and device."""
        region = wait_for_region(guest, nvdimm.slot)
        if region.node.hcall_flush_required is not nvdimm.flushes_by_hcall:
            raise ContractError(f"{nvdimm}: {region.node}")
        return region, create_namespace(guest, region, mode="devdax").character_device

    def judge(self, nvdimm: Nvdimm) -> tuple[list[CellReport], int]:
        """Compare all cells but those that depend on MAP_SYNC; return these and the alignment."""
        guest = self.boot(Machine(nvdimms=(nvdimm,)))
        region, device = self.device(guest, nvdimm)
        align = device.align_bytes
        whole = at_offsets([*CELLS, Cell(type="shared_validate", fsync=True)], align)
        ranges = [*RANGES, Cell(type="shared_validate", length=align + align // 2)]
        # Disjoint offsets: with an alignment of one page more of the ranges are mapped.
        for number, cell in enumerate(ranges):
            begin = (len(whole) + 2 * number) * align
            ranges[number] = dataclasses.replace(cell, offset=begin + cell.offset)
        with guest.expect_messages(REFUSAL):
            reports = map_sync_cells(guest, device.path, (*whole, *ranges), pages=None)
        self.measure("cells", {str(r.cell): str(r.mapping) for r in reports})
        self.metric("align", align, "bytes")
        prove(reports)
        by_sync = [
            r
            for r in reports
            if expected_answer(r.cell, FileKind.DEVICE)[0] == SF and not r.mapped_bytes % align
        ]
        rest = [r for r in reports if r not in by_sync]
        faults = table_differences(rest, FileKind.DEVICE, align_bytes=align)
        # dax_fops has no fsync: fs/sync.c, vfs_fsync_range.
        faults += [
            f"{r.cell}: expected fsync() to fail with EINVAL, found {r.fsync_errno}"
            for r in reports
            if r.cell.fsync and r.fsync_errno != errno.EINVAL
        ]
        if faults:
            raise ContractError(f"{device.name}:\n  " + "\n  ".join(faults))
        on_host = OnHost(guest, region, device)
        stored = [r for r in reports if r.mapping.store_in_mapping]
        absent = [f"{r.cell}: {len(lost)} pages" for r in stored if (lost := on_host.absent(r))]
        if absent or not stored:
            raise ContractError(
                f"stores of {len(absent)} of {len(stored)} mappings are missing at their offset in "
                "the backing file:\n  " + "\n  ".join(absent)
            )
        self.metric("stores_on_host", sum(len(r.stored()) for r in stored), "stores")
        return by_sync, align

    def test_pmem_on(self) -> None:
        """Devdax on pmem=on grants MAP_SYNC with each type of shared mapping, and keeps stores.

        A private or unaligned mapping is refused with EINVAL, and so is fsync().
        """
        by_sync, align = self.judge(PMEM_ON)
        if faults := table_differences(by_sync, FileKind.DEVICE, align_bytes=align):
            raise ContractError("MAP_SYNC:\n  " + "\n  ".join(faults))

    def test_pmem_off(self) -> None:
        """Devdax on pmem=off refuses MAP_SYNC with EOPNOTSUPP; the rest is as on pmem=on.

        Linux grants it: known issue linux-devdax-grants-map-sync.
        """
        by_sync, align = self.judge(PMEM_OFF)
        granted = table_differences(by_sync, FileKind.DEVICE, align_bytes=align)
        refused = [
            r
            for r in by_sync
            if r.mapping.result is MapResult.REFUSED and r.mapping.errno == errno.EOPNOTSUPP
        ]
        if granted and len(refused) != len(by_sync):
            raise ContractError(
                "MAP_SYNC is granted, but differs from pmem=on:\n  " + "\n  ".join(granted)
            )
        self.known_issue(
            "linux-devdax-grants-map-sync",
            shows=not granted,
            found=f"{len(by_sync) - len(refused)} of {len(by_sync)} mappings have MAP_SYNC though "
            "the region needs H_SCM_FLUSH",
        )

    def test_offset(self) -> None:
        """A mapping whose offset is not a multiple of the device's alignment fails with EINVAL.

        Commit 9702cffdbf21 ("device-dax: implement ->split() to catch invalid munmap attempts")
        requires it, but check_vma checks only the addresses: known issue
        linux-devdax-maps-another-offset.
        """
        guest = self.boot(Machine(nvdimms=(PMEM_ON,)))
        region, device = self.device(guest, PMEM_ON)
        align = device.align_bytes
        if align <= read_page_size(guest):
            raise CapabilityError(
                f"{device.name} has an alignment of {align} bytes, one page: every offset in whole "
                "pages is aligned",
                hint="take a CPU with a radix MMU, such as -p cpu=POWER9",
            )
        whole = Cell(type="shared_validate", offset=align, length=align, address_align=align)
        half = dataclasses.replace(whole, offset=3 * align + align // 2)
        with guest.expect_messages(REFUSAL):
            control, report = map_sync_cells(guest, device.path, (whole, half), pages=None)
        prove((control, report))
        on_host = OnHost(guest, region, device)
        if faults := table_differences([control], FileKind.DEVICE, align_bytes=align):
            raise ContractError("the control:\n  " + "\n  ".join(faults))
        if on_host.absent(control):
            raise ContractError(f"the control's stores are not in the backing file: {control.cell}")
        mapping = report.mapping
        if mapping.result is MapResult.REFUSED and mapping.errno == errno.EINVAL:
            shows, outcome = False, "the mapping is refused"
        elif not mapping.store_in_mapping:
            raise ContractError(f"{report.cell}: expected EINVAL, found {mapping}")
        elif not on_host.absent(report):
            shows, outcome = False, "the mapping succeeds, and its stores are at their offset"
        elif not on_host.absent(report, shift=-align // 2):
            shows = True
            outcome = f"stores at offset {half.offset:#x} are at {half.offset - align // 2:#x}"
        else:
            raise ContractError(
                f"{report.cell}: {mapping}, but the backing file does not have the stores"
            )
        self.known_issue("linux-devdax-maps-another-offset", shows=shows, found=outcome)
