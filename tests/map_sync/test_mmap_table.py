# SPDX-License-Identifier: GPL-2.0-or-later
"""Results of mmap() for each combination of type, MAP_SYNC, unknown flag and access.

paprscm/map_sync/mmap_table.py has the table, and for each result the place in the kernel.
Linux differs from mmap(2) twice: there, MAP_SHARED ignores unknown flags, and MAP_SYNC is for
MAP_SHARED_VALIDATE only. A kernel that follows mmap(2) passes with WARN. So far:

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
    """Assert that each cell was tried on the kind of file that the test is about.

    Args:
        reports: the cells' results.
        dax: whether statx says that the file is DAX.
        fs: the name of its file system; of a device's node it is devtmpfs, which is a tmpfs.
        block: it is a block device, not a regular file.
    """
    wanted = ("block" if block else "regular", dax, fs)
    found = {
        (report.file.type, report.file.dax, report.file.fs_name) if report.file else None
        for report in reports
        if not report.cell.anonymous
    }
    if found != {wanted}:
        raise ContractError(f"the file's (type, DAX, file system) are {found}, expected {wanted}")


class Cells(PaprScmTest):
    """
    One kind of file on one backend.

    :avocado: tags=map_sync
    """

    def judge(self, reports: Sequence[CellReport], kind: FileKind) -> None:
        """Compare all cells with the column of the table."""
        self.measure("cells", {str(r.cell): str(r.mapping) for r in reports})
        if found := table_differences(reports, kind):
            raise ContractError(f"{len(found)} of {len(reports)} cells:\n  " + "\n  ".join(found))
        if other := as_documented(reports, kind):
            self.remark("as without MAP_SYNC, so far with it:\n  " + "\n  ".join(other))

    def mounted(self, nvdimm: Nvdimm, fstype: FsType, *, options: str = "dax=always") -> Guest:
        """Boot a guest, and mount a file system with page-sized blocks on /mnt."""
        guest = self.boot(Machine(nvdimms=(nvdimm.holding(fstype),)))
        made = dax_mount(guest, nvdimm.slot, fstype, "/mnt", options=options)
        asked = made.region.node.hcall_flush_required
        if asked is not nvdimm.flushes_by_hcall or made.block_size != made.page_size:
            raise ContractError(
                f"{nvdimm}: ibm,hcall-flush-required is there: {asked}; "
                f"blocks of {made.block_size} bytes, pages of {made.page_size}"
            )
        return guest

    def on_dax(self, nvdimm: Nvdimm, fstype: FsType, kind: FileKind) -> None:
        """Judge a DAX file."""
        guest = self.mounted(nvdimm, fstype)
        reports = map_sync_cells(guest, "/mnt/file", ALL, pages=2)
        prove(reports, dax=True, fs=fstype)
        self.judge(reports, kind)

    def off_dax(self, fstype: FsType) -> None:
        """Judge a file that differs from a file with MAP_SYNC by dax=never only."""
        guest = self.mounted(PMEM_ON, fstype, options="dax=never")
        reports = map_sync_cells(guest, "/mnt/file", ALL, pages=2)
        prove(reports, dax=False, fs=fstype)
        self.judge(reports, FileKind.REFUSES)

    def test_xfs_on_pmem_on(self) -> None:
        """A DAX file on XFS over pmem=on: MAP_SYNC is granted with each type of mapping.

        With MAP_SHARED and MAP_PRIVATE, too, unlike mmap(2).
        """
        self.on_dax(PMEM_ON, "xfs", FileKind.GRANTS)

    def test_ext4_on_pmem_on(self) -> None:
        """A DAX file on ext4 over pmem=on: MAP_SYNC is granted with each type of mapping.

        With MAP_SHARED and MAP_PRIVATE, too, unlike mmap(2).
        """
        self.on_dax(PMEM_ON, "ext4", FileKind.GRANTS)

    def test_xfs_on_pmem_off(self) -> None:
        """A DAX file on XFS over pmem=off: MAP_SYNC fails with EOPNOTSUPP with each type.

        In mmap(2), MAP_SHARED ignores it.
        """
        self.on_dax(PMEM_OFF, "xfs", FileKind.REFUSES)

    def test_ext4_on_pmem_off(self) -> None:
        """A DAX file on ext4 over pmem=off: MAP_SYNC fails with EOPNOTSUPP with each type.

        In mmap(2), MAP_SHARED ignores it.
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

        This is why an errno alone proves nothing.
        """
        self.off_dax("xfs")

    def test_ext4_without_dax(self) -> None:
        """A file on ext4 with dax=never behaves as over pmem=off, although the DIMM has pmem=on.

        This is why an errno alone proves nothing.
        """
        self.off_dax("ext4")

    def test_tmpfs(self) -> None:
        """On tmpfs MAP_SYNC fails with MAP_SHARED_VALIDATE only.

        With MAP_SHARED and MAP_PRIVATE it is granted, with `sf` in VmFlags, which promises nothing
        and is not in mmap(2): mm/shmem.c, shmem_mmap, ignores VM_SYNC.
        """
        guest = self.boot()
        guest.succeed("mkdir /mnt/t && mount -t tmpfs tmpfs /mnt/t")
        reports = map_sync_cells(guest, "/mnt/t/file", ALL, pages=2)
        prove(reports, dax=False, fs="tmpfs")
        self.judge(reports, FileKind.UNAWARE)

    def test_block_device(self) -> None:
        """The pmem block device itself uses the page cache, and treats MAP_SYNC as tmpfs does.

        On pmem=on, in an fsdax namespace, where a file system on it would grant MAP_SYNC.
        """
        guest = self.boot(Machine(nvdimms=(PMEM_ON.holding("fsdax"),)))
        region = wait_for_region(guest, 0)
        disk = create_fsdax(guest, region)
        if disk.dax != "1" or region.node.hcall_flush_required:
            raise ContractError(f"{disk.name} does not have the properties of pmem=on: {disk}")
        reports = map_sync_cells(guest, disk.path, ALL, pages=None)
        prove(reports, dax=False, fs="tmpfs", block=True)
        self.judge(reports, FileKind.UNAWARE)
