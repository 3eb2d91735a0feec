# SPDX-License-Identifier: GPL-2.0-or-later
"""Files on DAX hold what was written, whatever is done with their extents.

Cloned, deduplicated, punched, collapsed and truncated files share and move blocks under mappings
that have no page cache in between (fs/dax.c, fs/xfs/xfs_reflink.c, fs/ext4/extents.c).
"""

from __future__ import annotations

from paprscm.errors import HostError
from paprscm.guest.guest import Guest
from paprscm.map_sync.probe import map_sync
from paprscm.map_sync.verdict import on_dax_file
from paprscm.pmem.extents import exercise
from paprscm.pmem.fs_health import check_offline
from paprscm.pmem.mounts import FsType, dax_mount
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import FOR_XFS, PMEM_OFF, PMEM_ON
from paprscm.vm.machine import GIB, MIB, Machine, Nvdimm

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
PUNCH_SEED = 638374648
UNWRITTEN_ISSUE = "linux-dax-dedupe-compares-unwritten"
# File d has data, and after the removal of x most free blocks have the same. The new file s has
# some of them, but reads as zeros; one of those blocks is at the offset `at`.
DEDUPE = """\
set -e
cd /mnt
xfs_io -f -c 'pwrite -q -S 0x5a 0 {block}' d
xfs_io -f -c 'pwrite -q -S 0x5a -b 4m 0 {fill}' x || :
sync
rm x
sync
xfs_io -f -c 'falloc 0 {size}' s
sync
before=$(cksum < d)
for at in $(seq 0 {step} $(({size} - {block}))); do
	set -- $(xfs_io -c "fiemap $at {block}" s |
		sed -n 's/.*\\[\\([0-9]*\\)\\.\\..*\\]: \\([0-9]*\\)\\.\\..*/\\1 \\2/p')
	blocks=$(dd if={disk} bs=512 skip=$(($2 + at / 512 - $1)) count=$(({block} / 512)) \
		iflag=direct 2> /dev/null | cksum)
	[ "$blocks" != "$before" ] || break
done
echo "blocks $blocks"
echo "reads $(dd if=s bs={block} skip=$((at / {block})) count=1 2> /dev/null | cksum)"
echo "before $before"
echo "answer $(xfs_io -c "dedupe s $at 0 {block}" d 2>&1 | head -n 1)"
echo "after $(cksum < d)"
"""


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

    def judge(self, nvdimm: Nvdimm, fstype: FsType) -> None:
        """Make random operations on files that are proven to be DAX, then check the file system."""
        guest = self.boot(Machine(nvdimms=(nvdimm.at(0, FOR_XFS).holding(fstype),)))
        made = dax_mount(guest, 0, fstype, "/mnt")
        self.expect_dax(guest, nvdimm, fstype)
        needed = BASIC | SHARING if fstype == "xfs" else BASIC
        for base in BASES:
            seed = self.random().getrandbits(32)
            report = exercise(
                guest, "/mnt", block_bytes=made.block_size, base=base, seed=seed, steps=STEPS
            )
            self.metric("operations", sum(report.done.values()), "operations", base=base)
            self.measure(f"seed {seed}, base {base}", report.done)
            if fstype == "xfs" and report.punch_shows_data:
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

    def test_punch(self) -> None:
        """On XFS, a punched range of a file with shared blocks reads as zeros.

        fallocate(2), FALLOC_FL_PUNCH_HOLE. The steps are those that a random run has found.
        """
        guest = self.boot(Machine(nvdimms=(PMEM_OFF.at(0, FOR_XFS).holding("xfs"),)))
        block = dax_mount(guest, 0, "xfs", "/mnt").block_size
        self.expect_dax(guest, PMEM_OFF, "xfs")
        report = exercise(guest, "/mnt", block_bytes=block, base=0, seed=PUNCH_SEED, steps=STEPS)
        if not report.punch_shows_data:
            report.expect_correct(BASIC | SHARING)
        found = report.place if report.failure else f"{report.steps} steps without a difference"
        self.known_issue(PUNCH_ISSUE, shows=report.punch_shows_data, found=found)

    def test_dedupe_unwritten(self) -> None:
        """On XFS, space that was never written equals no data, whatever its blocks hold.

        ioctl_fideduperange(2): ranges with different contents are not shared.
        """
        guest = self.boot(Machine(nvdimms=(PMEM_ON.at(0, FOR_XFS).holding("xfs"),)))
        made = dax_mount(guest, 0, "xfs", "/mnt")
        self.expect_dax(guest, PMEM_ON, "xfs")
        block = made.block_size
        output = guest.succeed(
            DEDUPE.format(
                block=block, fill=FOR_XFS, size=FOR_XFS // 2, step=8 * MIB, disk=made.mount.device
            )
        )
        found = dict(line.split(" ", 1) for line in output.splitlines())
        if found["blocks"] != found["before"] or found["reads"] == found["before"]:
            raise HostError(f"the blocks of the new file do not have old data: {found}")
        self.measure("answer", found["answer"])
        lost = found["before"] != found["after"]
        self.known_issue(
            UNWRITTEN_ISSUE,
            shows=lost,
            found=f"the file has lost its data: {found['answer']}" if lost else found["answer"],
        )

    def test_ext4(self) -> None:
        """On ext4, pmem=off: files whose extents move keep their contents."""
        self.judge(PMEM_OFF, "ext4")
