# SPDX-License-Identifier: GPL-2.0-or-later
"""Results of mmap() for each combination of type, MAP_SYNC, unknown flag and access.

paprscm/map_sync/mmap_table.py has the table, with the kernel source of each result. By mmap(2),
MAP_SHARED ignores unknown flags, and MAP_SYNC works only with MAP_SHARED_VALIDATE. A kernel that
follows mmap(2) passes with WARN. So far Linux differs:

* MAP_SHARED|MAP_SYNC and MAP_PRIVATE|MAP_SYNC are granted, or refused with EOPNOTSUPP, like
  MAP_SHARED_VALIDATE|MAP_SYNC;
* on tmpfs, on a block device and for anonymous memory they are granted, with `sf` in VmFlags.
"""

from collections.abc import Iterable, Sequence

from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.map_sync.mmap_report import CellReport
from paprscm.map_sync.mmap_table import (
    ANONYMOUS,
    CELLS,
    RANGES,
    FileKind,
    as_documented,
    table_differences,
)
from paprscm.map_sync.probe import map_sync_cells
from paprscm.pmem.mounts import FsType, dax_mount
from paprscm.pmem.namespaces import create_fsdax
from paprscm.pmem.regions import wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import OVERRIDE, PMEM_OFF, PMEM_ON
from paprscm.vm.machine import Machine, Nvdimm

ALL = (*CELLS, *RANGES, *ANONYMOUS)


def prove(reports: Iterable[CellReport], *, dax: bool, fs: str, block: bool = False) -> None:
    """Raise ContractError unless each cell was tried on this kind of file.

    Args:
        reports: the cells' results.
        dax: expected DAX attribute in statx.
        fs: name of its file system; a device node is on devtmpfs, which is a tmpfs.
        block: the file is a block device, not a regular file.
    """
    expected = ("block" if block else "regular", dax, fs)
    kinds = {
        (report.file.type, report.file.dax, report.file.fs_name) if report.file else None
        for report in reports
        if not report.cell.anonymous
    }
    if kinds != {expected}:
        raise ContractError(f"the file's (type, DAX, file system) are {kinds}, expected {expected}")


class Cells(PaprScmTest):
    """
    One kind of file on one backend.

    :avocado: tags=map_sync
    """

    def judge(self, reports: Sequence[CellReport], kind: FileKind) -> None:
        """Compare all cells with the column of the table."""
        self.measure("cells", {str(r.cell): str(r.mapping) for r in reports})
        if faults := table_differences(reports, kind):
            raise ContractError(f"{len(faults)} of {len(reports)} cells:\n  " + "\n  ".join(faults))
        if other := as_documented(reports, kind):
            self.remark(
                "MAP_SYNC is ignored as in mmap(2), unlike so far:\n  " + "\n  ".join(other)
            )

    def mounted(self, nvdimm: Nvdimm, fstype: FsType, *, options: str = "dax=always") -> Guest:
        """Boot a guest, and mount a file system with page-sized blocks on /mnt."""
        guest = self.boot(Machine(nvdimms=(nvdimm.holding(fstype),)))
        mounted = dax_mount(guest, nvdimm.slot, fstype, "/mnt", options=options)
        by_hcall = mounted.region.node.hcall_flush_required
        if by_hcall is not nvdimm.flushes_by_hcall or mounted.block_size != mounted.page_size:
            raise ContractError(
                f"{nvdimm}: ibm,hcall-flush-required is present: {by_hcall}; "
                f"blocks of {mounted.block_size} bytes, pages of {mounted.page_size}"
            )
        return guest

    def on_dax(self, nvdimm: Nvdimm, fstype: FsType, kind: FileKind) -> None:
        """Judge a DAX file."""
        guest = self.mounted(nvdimm, fstype)
        reports = map_sync_cells(guest, "/mnt/file", ALL, pages=2)
        prove(reports, dax=True, fs=fstype)
        self.judge(reports, kind)

    def off_dax(self, fstype: FsType) -> None:
        """Judge a file on pmem=on with dax=never, the only difference from a file with MAP_SYNC."""
        guest = self.mounted(PMEM_ON, fstype, options="dax=never")
        reports = map_sync_cells(guest, "/mnt/file", ALL, pages=2)
        prove(reports, dax=False, fs=fstype)
        self.judge(reports, FileKind.REFUSES)

    def test_xfs_on_pmem_on(self) -> None:
        """On a DAX file on XFS over pmem=on, MAP_SYNC is granted with each type of mapping.

        Unlike mmap(2), with MAP_SHARED and MAP_PRIVATE, too.
        """
        self.on_dax(PMEM_ON, "xfs", FileKind.GRANTS)

    def test_ext4_on_pmem_on(self) -> None:
        """On a DAX file on ext4 over pmem=on, MAP_SYNC is granted with each type of mapping.

        Unlike mmap(2), with MAP_SHARED and MAP_PRIVATE, too.
        """
        self.on_dax(PMEM_ON, "ext4", FileKind.GRANTS)

    def test_xfs_on_pmem_off(self) -> None:
        """On a DAX file on XFS over pmem=off, MAP_SYNC fails with EOPNOTSUPP with each type.

        By mmap(2), MAP_SHARED ignores it.
        """
        self.on_dax(PMEM_OFF, "xfs", FileKind.REFUSES)

    def test_ext4_on_pmem_off(self) -> None:
        """On a DAX file on ext4 over pmem=off, MAP_SYNC fails with EOPNOTSUPP with each type.

        By mmap(2), MAP_SHARED ignores it.
        """
        self.on_dax(PMEM_OFF, "ext4", FileKind.REFUSES)

    def test_xfs_on_pmem_override(self) -> None:
        """A DAX file on XFS over pmem=on with pmem-override=on behaves as over pmem=off."""
        self.on_dax(OVERRIDE, "xfs", FileKind.REFUSES)

    def test_ext4_on_pmem_override(self) -> None:
        """A DAX file on ext4 over pmem=on with pmem-override=on behaves as over pmem=off."""
        self.on_dax(OVERRIDE, "ext4", FileKind.REFUSES)

    def test_xfs_without_dax(self) -> None:
        """A file on XFS with dax=never behaves as over pmem=off, although the DIMM has pmem=on.

        So the errno alone does not identify the cause.
        """
        self.off_dax("xfs")

    def test_ext4_without_dax(self) -> None:
        """A file on ext4 with dax=never behaves as over pmem=off, although the DIMM has pmem=on.

        So the errno alone does not identify the cause.
        """
        self.off_dax("ext4")

    def test_tmpfs(self) -> None:
        """On tmpfs, MAP_SYNC fails only with MAP_SHARED_VALIDATE.

        With MAP_SHARED and MAP_PRIVATE it is granted, with `sf` in VmFlags, although mmap(2) does
        not mention it and nothing is persistent: mm/shmem.c, shmem_mmap, ignores VM_SYNC.
        """
        guest = self.boot()
        guest.succeed("mkdir /mnt/t && mount -t tmpfs tmpfs /mnt/t")
        reports = map_sync_cells(guest, "/mnt/t/file", ALL, pages=2)
        prove(reports, dax=False, fs="tmpfs")
        self.judge(reports, FileKind.UNAWARE)

    def test_block_device(self) -> None:
        """A mapping of the pmem block device uses the page cache; MAP_SYNC behaves as on tmpfs.

        The disk is an fsdax namespace on pmem=on: a file system on it would grant MAP_SYNC.
        """
        guest = self.boot(Machine(nvdimms=(PMEM_ON.holding("fsdax"),)))
        region = wait_for_region(guest, 0)
        disk = create_fsdax(guest, region)
        if disk.dax != "1" or region.node.hcall_flush_required:
            raise ContractError(f"{disk.name} does not have the properties of pmem=on: {disk}")
        reports = map_sync_cells(guest, disk.path, ALL, pages=None)
        prove(reports, dax=False, fs="tmpfs", block=True)
        self.judge(reports, FileKind.UNAWARE)
