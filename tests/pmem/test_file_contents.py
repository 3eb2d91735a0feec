# SPDX-License-Identifier: GPL-2.0-or-later
"""Files on DAX hold what was written, whatever is done with their extents.

Cloned, deduplicated, punched, collapsed and truncated files share and move blocks under mappings
that have no page cache in between (fs/dax.c, fs/xfs/xfs_reflink.c, fs/ext4/extents.c).
"""

from __future__ import annotations

from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.guest.report import ProbeError
from paprscm.map_sync.probe import map_sync
from paprscm.map_sync.verdict import on_dax_file
from paprscm.pmem.extents import ExtentsReport, exercise
from paprscm.pmem.fs_health import check_offline
from paprscm.pmem.mounts import FsType, dax_mount
from paprscm.pmem.namespaces import create_namespace
from paprscm.pmem.regions import wait_for_region
from paprscm.pmem.shared_blocks import (
    HUGE_PAGE_ISSUE,
    HUGE_PAGE_WARNING,
    PIN_ISSUE,
    huge_page_warnings,
    require_shared_blocks,
    stopped_at_pin,
)
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import FOR_XFS, PMEM_OFF, PMEM_ON, SMALL
from paprscm.vm.machine import GIB, Machine, Nvdimm

STEPS = 500
BASES = (0, 64 * GIB)
"""Where the files begin; beyond the size of the DIMM, offsets and sizes cannot be confused."""
BASIC = {
    *("write", "store", "truncate", "allocate", "punch", "zero", "collapse", "insert", "copy"),
    *("direct write", "sync"),
}
SHARING = {"clone", "dedupe", "dedupe equal", "unshare"}
"""Operations of XFS with reflink; ext4 has no shared extents."""

PUNCH_ISSUE = "linux-xfs-punch-shows-old-blocks"


class FileContents(PaprScmTest):
    """
    Two files on one DIMM.

    :avocado: tags=pmem
    """

    def expect_dax(self, guest: Guest, nvdimm: Nvdimm, fstype: FsType) -> None:
        """Prove that new files are DAX."""
        report = map_sync(guest, "/mnt/probe")
        self.check_map_sync("a new file", report, on_dax_file(nvdimm), fstype=fstype)
        self.checkpoint()

    def exercise(
        self, guest: Guest, scratch: str, block: int, base: int, seed: int
    ) -> ExtentsReport | None:
        """Make random operations; None: they ended with a known issue of shared blocks."""
        report = None
        try:
            report = exercise(
                guest, "/mnt", scratch, block_bytes=block, base=base, seed=seed, steps=STEPS
            )
        except ProbeError:
            if not huge_page_warnings(guest):
                raise
        except ContractError:
            if not stopped_at_pin(guest):
                raise
            found = "I/O from a mapped page whose block is shared stops the kernel"
            self.known_issue(PIN_ISSUE, shows=True, found=found)
            return None
        for line in huge_page_warnings(guest)[:1]:
            self.known_issue(HUGE_PAGE_ISSUE, shows=True, found=line)
        return report

    def judge(self, nvdimm: Nvdimm, fstype: FsType) -> None:
        """Make random operations on files that are proven to be DAX, then check the file system."""
        disk, spare = nvdimm.at(0, FOR_XFS).holding(fstype), PMEM_ON.at(1, SMALL).holding("raw")
        machine = Machine(nvdimms=(disk, spare))
        guest = self.boot(machine, allowed=[HUGE_PAGE_WARNING] if fstype == "xfs" else ())
        scratch = create_namespace(guest, wait_for_region(guest, 1), mode="raw").path
        made = dax_mount(guest, 0, fstype, "/mnt")
        self.expect_dax(guest, nvdimm, fstype)
        if fstype == "xfs":
            require_shared_blocks(guest)
        needed = BASIC | SHARING if fstype == "xfs" else BASIC
        for base in BASES:
            seed = self.random().getrandbits(32)
            report = self.exercise(guest, scratch, made.block_size, base, seed)
            if report is None:
                return
            self.metric("operations", sum(report.done.values()), "operations", base=base)
            self.measure(f"seed {seed}, base {base}", report.done)
            if fstype == "xfs" and report.punch_shows_blocks:
                self.known_issue(PUNCH_ISSUE, shows=True, found=report.place)
                return
            report.expect_correct(needed)
            guest.succeed("rm /mnt/a /mnt/b")
        check_offline(guest, [made.mount])

    def test_xfs(self) -> None:
        """On XFS, pmem=on: cloned and deduplicated files keep their contents."""
        self.judge(PMEM_ON, "xfs")

    def test_xfs_off(self) -> None:
        """On XFS, pmem=off: cloned and deduplicated files keep their contents."""
        self.judge(PMEM_OFF, "xfs")

    def test_ext4(self) -> None:
        """On ext4, pmem=off: files whose extents move keep their contents."""
        self.judge(PMEM_OFF, "ext4")
