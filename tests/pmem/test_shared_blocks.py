# SPDX-License-Identifier: GPL-2.0-or-later
"""Files on XFS with DAX that share blocks: a test for each bug that random operations have found.

Only equal ranges are shared by deduplication (ioctl_fideduperange(2)), and shared blocks can be
mapped, stored to, punched and used for I/O as any others (fs/dax.c, fs/xfs/xfs_reflink.c).
"""

from __future__ import annotations

from paprscm.errors import CapabilityError, ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.map_sync.probe import map_sync
from paprscm.map_sync.verdict import on_dax_file
from paprscm.pmem.mounts import DaxMount, dax_mount
from paprscm.pmem.namespaces import create_namespace
from paprscm.pmem.pins import write_mapped_page
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
from paprscm.vm.dimms import FOR_XFS, PMEM_ON, SMALL
from paprscm.vm.machine import MIB, Machine, Nvdimm

PUNCH_ISSUE = "linux-xfs-punch-shows-old-blocks"
UNWRITTEN_ISSUE = "linux-dax-dedupe-compares-unwritten"
EXTENTS_ISSUE = "linux-dax-dedupe-compares-other-range"
HUGE = 2 * MIB
"""Size of a huge page (PMD) with the radix MMU, bytes."""
LIMIT_S = 300.0
"""One script writes 400 MiB; so far 30 s on a busy host."""

# File d has data, and after the removal of x most free blocks have the same. The new file s has
# some of them, but reads as zeros; one of those blocks is at the offset `at`.
DEDUPE_UNWRITTEN = """\
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

# File b is a clone of a, and 2 MiB of it are aligned for a huge page. a is mapped in small pages.
MAP_SHARED = """\
set -e
place() {{
	sync
	sector=$(xfs_io -c fiemap a | sed -n '$s/.*: \\([0-9]*\\)\\.\\..*/\\1/p')
	echo $((sector * 512 % {huge}))
}}
cd /mnt
xfs_io -f -c "pwrite -q -b {size} 0 {size}" a
begin=$(place)
rm a
sync
xfs_io -f -c "pwrite -q -b {size} $begin {size}" a
echo "begin $begin"
echo "place $(place)"
cp --reflink=always a b
xfs_io -c "mmap -r {huge} {page}" -c "mread {huge} 1" a
status=0
xfs_io -c "mmap -r {huge} {huge}" -c "mread {huge} 1" b || status=$?
echo "status $status"
"""
# Free blocks have the data of x. The page fault of the mapped store asks for 2 MiB, where the CoW
# fork of b has two extents.
PUNCH = """\
set -e
cd /mnt
xfs_io -f -c 'pwrite -q -S 0x5a -b 4m 0 {fill}' x || :
sync
rm x
sync
xfs_io -f -c "pwrite -q -S 1 -b {huge} 0 {huge}" a
cp --reflink=always a b
xfs_io -c "pwrite -q -S 2 {block} {block}" b
xfs_io -c "reflink a" b > /dev/null
xfs_io -c "mmap -rw 0 {huge}" -c "mwrite -S 7 0 1" b
xfs_io -c "fpunch {start} {length}" b
echo "stored $(dd if=b bs=1 count=1 2> /dev/null | od -A n -t u1)"
echo "bytes $(dd if=b bs={start} skip=1 2> /dev/null | head -c {length} | tr -d '\\0' | wc -c)"
echo "after $(dd if=b bs={end} skip=1 2> /dev/null | head -c 1 | od -A n -t u1)"
"""
# Two equal blocks in two extents, and two different ones in one extent.
DEDUPE_EXTENTS = """\
set -e
cd /mnt
xfs_io -f -c "pwrite -q -S 1 0 {block}" other
xfs_io -f -c "pwrite -q -S 1 0 {two}" -c "pwrite -q -S 2 {block} {block}" source
xfs_io -f -c "pwrite -q -S 1 0 {block}" -c "reflink other 0 {block} {block}" data > /dev/null
sync
echo "before $(cksum < data)"
echo "source $(cksum < source)"
echo "answer $(xfs_io -c "dedupe source 0 0 {two}" data 2>&1 | head -n 1)"
echo "after $(cksum < data)"
"""


class SharedBlocks(PaprScmTest):
    """
    Files of one file system on DAX.

    :avocado: tags=pmem
    """

    def start(self, *others: Nvdimm, allowed: tuple[str, ...] = ()) -> tuple[Guest, DaxMount]:
        """Start a guest with a file system on DIMM 0, and prove that new files are DAX."""
        nvdimm = PMEM_ON.at(0, FOR_XFS).holding("xfs")
        guest = self.boot(Machine(nvdimms=(nvdimm, *others)), allowed=allowed)
        made = dax_mount(guest, 0, "xfs", "/mnt")
        report = map_sync(guest, "/mnt/probe")
        self.check_map_sync("a new file", report, on_dax_file(nvdimm), fstype="xfs")
        self.checkpoint()
        return guest, made

    def start_radix(self, allowed: tuple[str, ...] = ()) -> tuple[Guest, DaxMount]:
        """Start a guest whose huge pages have 2 MiB; with the hash MMU they have 16 MiB."""
        guest, made = self.start(allowed=allowed)
        mmu = guest.succeed("sed -n 's/^MMU.*: //p' /proc/cpuinfo").strip()
        if mmu != "Radix":
            raise CapabilityError(f"a mapping of {HUGE // MIB} MiB needs the radix MMU, not {mmu}")
        return guest, made

    def run_script(self, guest: Guest, script: str, **values: object) -> dict[str, str]:
        """Run a script; return the rest of each line by its first word."""
        output = guest.succeed(script.format(**values), timeout_s=LIMIT_S)
        return dict(line.split(None, 1) for line in output.splitlines())

    def judge(self, issue: str, found: dict[str, str]) -> None:
        """Judge a deduplication of unequal ranges: the destination keeps its contents."""
        self.measure("answer", found["answer"])
        lost = found["before"] != found["after"]
        self.known_issue(
            issue,
            shows=lost,
            found=f"the file has other data: {found['answer']}" if lost else found["answer"],
        )

    def test_pin(self) -> None:
        """I/O from a mapped page ends, whether the file shares its blocks or not."""
        guest, made = self.start(PMEM_ON.at(1, SMALL).holding("raw"))
        scratch = create_namespace(guest, wait_for_region(guest, 1), mode="raw").path
        guest.succeed(f"dd if=/dev/urandom of=/mnt/a bs={made.block_size} count=1 2> /dev/null")
        if not write_mapped_page(guest, "/mnt/a", scratch):
            raise ContractError("O_DIRECT from a mapped page of a file that shares no block spins")
        guest.succeed("cp --reflink=always /mnt/a /mnt/b && sync -f /mnt")
        try:
            ends = "ends" if write_mapped_page(guest, "/mnt/a", scratch) else "does not end"
        except ContractError:
            if not stopped_at_pin(guest):
                raise
            ends = "stops the kernel"
        self.known_issue(
            PIN_ISSUE,
            shows=ends != "ends",
            found=f"O_DIRECT from a mapped page whose block is shared {ends}",
        )

    def test_map_huge(self) -> None:
        """A clone is read through a huge page, also if the other file is mapped in small pages."""
        guest, made = self.start_radix(allowed=(HUGE_PAGE_WARNING,))
        require_shared_blocks(guest)
        found = self.run_script(guest, MAP_SHARED, size=4 * HUGE, huge=HUGE, page=made.block_size)
        if found["place"] != found["begin"]:
            raise HostError(f"the blocks of the file are not aligned: {found}")
        warnings = huge_page_warnings(guest)
        self.known_issue(
            HUGE_PAGE_ISSUE,
            shows=found["status"] != "0" or bool(warnings),
            found=f"the reader ends with status {found['status']}, {len(warnings)} warnings",
        )

    def test_punch(self) -> None:
        """A punched range of a file with shared blocks reads as zeros (fallocate(2))."""
        guest, made = self.start_radix()
        block = made.block_size
        start, end = 4 * block, 12 * block
        length = end - start
        found = self.run_script(
            guest,
            PUNCH,
            fill=FOR_XFS,
            huge=HUGE,
            block=block,
            start=start,
            end=end,
            length=length,
        )
        self.check("the byte that was stored", found["stored"], "7")
        self.check("the byte behind the hole", found["after"], "1")
        self.known_issue(
            PUNCH_ISSUE,
            shows=found["bytes"] != "0",
            found=f"{found['bytes']} of {length} bytes are not zero",
        )

    def test_dedupe_unwritten(self) -> None:
        """Space that was never written equals no data, whatever its blocks hold."""
        guest, made = self.start()
        found = self.run_script(
            guest,
            DEDUPE_UNWRITTEN,
            block=made.block_size,
            fill=FOR_XFS,
            size=FOR_XFS // 2,
            step=8 * MIB,
            disk=made.mount.device,
        )
        if found["blocks"] != found["before"] or found["reads"] == found["before"]:
            raise HostError(f"the blocks of the new file do not have old data: {found}")
        self.judge(UNWRITTEN_ISSUE, found)

    def test_dedupe_extents(self) -> None:
        """Ranges are compared as a whole, whatever their extents are."""
        guest, made = self.start()
        found = self.run_script(
            guest, DEDUPE_EXTENTS, block=made.block_size, two=2 * made.block_size
        )
        if found["source"] == found["before"]:
            raise HostError(f"the ranges are equal: {found}")
        self.judge(EXTENTS_ISSUE, found)
