# SPDX-License-Identifier: GPL-2.0-or-later
"""Number of flushes of each operation in the guest, on pmem=off.

blkdev_issue_flush, REQ_PREFLUSH and REQ_FUA each cause a flush (drivers/nvdimm/pmem.c:
pmem_submit_bio), so a bio with both flags makes two. Info blocks and BTTs are written by
nsio_rw_bytes (claim.c), which flushes each time. Too few flushes lose data; each superfluous one
costs 13 ms. The pinned numbers were measured on Linux 6.12. On another kernel a difference is only
reported, as long as every operation that promises durability flushes at least once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from paprscm.channel.kmsg import SLEEPS
from paprscm.errors import ContractError
from paprscm.flush.accounts import FlushAccounts
from paprscm.flush.trace import expect_protocol
from paprscm.guest.guest import Guest
from paprscm.pmem.btt_race import BTT_ISSUE, btt_sleep, first_write
from paprscm.pmem.namespaces import create_fsdax
from paprscm.pmem.regions import Region, read_page_size, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import FOR_XFS, PMEM_OFF, SMALL
from paprscm.vm.machine import Machine

PINNED = "6.12."
"""Kernel of the pinned numbers."""
SLOT = 2


@dataclass(frozen=True)
class Row:
    """One operation.

    Attributes:
        name: of the operation.
        command: shell, with $D for the disk, $F for a file, $P for the page size.
        flushes: pinned number; None: it depends on earlier write-back.
        durable: the operation promises durability, so it must flush at least once.
        once_more: one flush more is right, too: it depends on the guest's timing.
    """

    name: str
    command: str
    flushes: int | None
    durable: bool = False
    once_more: bool = False

    @property
    def right(self) -> list[int]:
        """The right numbers of flushes; empty: any."""
        return [] if self.flushes is None else [self.flushes, self.flushes + self.once_more]


DISK = (
    Row("deep_flush", "echo 1 > $R/deep_flush", 1, durable=True),
    Row("fsync", "xfs_io -c fsync $D", 1, durable=True),
    Row("fdatasync", "xfs_io -c fdatasync $D", 1, durable=True),
    Row("O_DIRECT write", "dd if=/dev/zero of=$D bs=64k count=1 oflag=direct", 0),
    Row(
        "O_DIRECT|O_DSYNC write",
        "dd if=/dev/zero of=$D bs=64k count=1 oflag=direct,dsync",
        2,
        durable=True,
    ),
    Row("buffered write", "dd if=/dev/zero of=$D bs=64k count=1 conv=notrunc", 0),
    Row(
        "buffered write, then fsync",
        "dd if=/dev/zero of=$D bs=64k count=1 conv=notrunc,fsync",
        1,
        durable=True,
    ),
    Row("sync() with a dirty disk", "xfs_io -c 'pwrite -q -b 64k 0 64k' -c '!sync' $D", 0),
    Row("BLKFLSBUF", "blockdev --flushbufs $D", 0),
    Row(
        "fsync with write_cache=write through",
        "c=/sys/block/${D#/dev/}/queue/write_cache; echo write through > $c; "
        "xfs_io -c fsync $D; s=$?; echo write back > $c; exit $s",
        0,
    ),
    Row("fsync with write_cache=write back again", "xfs_io -c fsync $D", 1, durable=True),
)

FILES = (
    Row(
        "fsync of a new file", "xfs_io -f -c 'pwrite -q -b 64k 0 64k' -c fsync $F", 2, durable=True
    ),
    Row("fsync of an overwrite", "xfs_io -c 'pwrite -q -b 64k 0 64k' -c fsync $F", 2, durable=True),
    Row("fsync of a clean file", "xfs_io -c fsync $F", 1),
    Row(
        "fdatasync of an overwrite",
        "xfs_io -c 'pwrite -q -b 64k 0 64k' -c fdatasync $F",
        1,
        durable=True,
    ),
    Row(
        "msync(MS_SYNC)",
        "xfs_io -c 'mmap -rw 0 64k' -c 'mwrite 0 64k' -c 'msync -s 0 64k' $F",
        1,
        durable=True,
    ),
    Row("msync(MS_SYNC) of a clean file", "xfs_io -c 'mmap -rw 0 64k' -c 'msync -s 0 64k' $F", 1),
    Row(
        "msync(MS_ASYNC)",
        "xfs_io -c 'mmap -rw 0 64k' -c 'mwrite 0 64k' -c 'msync -a 0 64k' $F",
        0,
    ),
    Row(
        "O_DSYNC write of a new file", "xfs_io -f -d -s -c 'pwrite -q -b 64k 0 64k' ${F}2", 2, True
    ),
)

SYNC = Row("sync()", "xfs_io -f -c 'pwrite -q -b 64k 0 64k' ${F}3; sync", 2, durable=True)
UMOUNT = Row("umount", "umount /mnt/a", None, durable=True)

XFS = (
    Row("mkfs.xfs", "mkfs.xfs -q -f -b size=$P $D", 2, durable=True),
    Row("mount", "mount -o dax=always $D /mnt/a", 0),
    *FILES,
    SYNC,
    UMOUNT,
)

EXT4 = (
    Row("mkfs.ext4", "mkfs.ext4 -q -F -E lazy_itable_init=0 -b $P $D", 3, durable=True),
    Row("mount", "mount -o dax=always,commit=600 $D /mnt/a", 1),
    *FILES,
    # sync() calls ext4_sync_fs twice. The first call starts a commit, which makes two flushes. If
    # it ends before the second call, that one finds none that will flush, and flushes itself
    # (fs/ext4/super.c, needs_barrier).
    replace(SYNC, once_more=True),
    UMOUNT,
)

NAMESPACES = (
    Row("creating fsdax", "ndctl create-namespace -r $N -m fsdax", 1, durable=True),
    Row("disabling it", "ndctl disable-namespace -r $N all", 1, durable=True),
    Row("destroying it", "ndctl destroy-namespace -f -r $N all", 1, durable=True),
    Row("creating devdax", "ndctl create-namespace -r $N -m devdax", 1, durable=True),
)

SECTOR = (
    Row("creating sector", "ndctl create-namespace -r $N -m sector", 519, durable=True),
    Row(
        "O_DIRECT write of a sector",
        "dd if=/dev/zero of=$(echo /dev/pmem*s) bs=4k count=1 oflag=direct",
        4,
        durable=True,
    ),
    Row("fsync", "xfs_io -c fsync $(echo /dev/pmem*s)", 0),
)


class FlushTable(PaprScmTest):
    """
    Operations one by one, each with its flushes, hypervisor calls and syncs.

    :avocado: tags=flush
    """

    def machine(
        self, size_bytes: int, *, holds: str = "", allowed: Sequence[str] = ()
    ) -> tuple[Guest, Region]:
        """Boot a guest with one DIMM, and count its flushes."""
        guest = self.boot(
            Machine(nvdimms=(PMEM_OFF.at(SLOT, size_bytes).holding(holds),)),
            shim=self.shim(),
            allowed=allowed,
        )
        region = wait_for_region(guest, SLOT)
        # By default XFS writes its log every 30 s.
        guest.succeed("mkdir -p /mnt/a; echo 72000 > /proc/sys/fs/xfs/xfssyncd_centisecs")
        return guest, region

    def judge(
        self,
        guest: Guest,
        region: Region,
        rows: tuple[Row, ...],
        disk: str = "",
        accounts: FlushAccounts | None = None,
    ) -> None:
        """Run the operations of the rows, and compare the flushes of each."""
        accounts = accounts or FlushAccounts(guest, [SLOT])
        settings = (
            f"D={disk} F=/mnt/a/file P={read_page_size(guest)} R={region.device} N={region.name}"
        )
        counts: dict[str, int] = {}
        for row in rows:
            guest.succeed(f"{settings}\n{row.command}")
            account = accounts.take()
            account.expect({SLOT: account.count})
            expect_protocol(account.all())
            counts[row.name] = account.count
        for name, count in counts.items():
            self.metric("flushes", count, "flushes", row=name)
        lost = [row.name for row in rows if row.durable and not counts[row.name]]
        if lost:
            raise ContractError(f"not flushed at all: {', '.join(lost)}")
        differ = [
            f"{row.name}: {counts[row.name]} flushes, pinned {row.flushes}"
            for row in rows
            if row.right and counts[row.name] not in row.right
        ]
        if differ:
            release = self.environment.kernel.release
            text = f"Linux {release}:\n  " + "\n  ".join(differ)
            if release.startswith(PINNED):
                raise ContractError(text)
            self.remark(text)

    def test_disk(self) -> None:
        """A disk is flushed by fsync, fdatasync and O_DSYNC, and not by a write alone."""
        guest, region = self.machine(SMALL, holds="fsdax")
        self.judge(guest, region, DISK, create_fsdax(guest, region).path)

    def test_xfs(self) -> None:
        """XFS flushes once for data, and twice for a log write."""
        guest, region = self.machine(FOR_XFS, holds="fsdax")
        self.judge(guest, region, XFS, create_fsdax(guest, region).path)

    def test_ext4(self) -> None:
        """ext4 flushes once for data, and twice for a journal write."""
        guest, region = self.machine(SMALL, holds="fsdax")
        self.judge(guest, region, EXT4, create_fsdax(guest, region).path)

    def test_namespaces(self) -> None:
        """A namespace's info block is flushed when it is written, a disk when it is disabled."""
        guest, region = self.machine(SMALL)
        self.judge(guest, region, NAMESPACES)

    def test_sector(self) -> None:
        """A BTT flushes after each of its own writes: four flushes for each sector."""
        guest, region = self.machine(SMALL, allowed=[SLEEPS.pattern])
        accounts = FlushAccounts(guest, [SLOT])
        self.judge(guest, region, SECTOR[:1], accounts=accounts)
        # A kernel that counts preemption reports the known issue at the first write; what it
        # counts and prints after that is meaningless.
        if trace := first_write(guest, guest.succeed("echo -n /dev/pmem*s")):
            self.known_issue(BTT_ISSUE, shows=True, found=btt_sleep(trace))
            return
        accounts.take()
        self.judge(guest, region, SECTOR[1:], accounts=accounts)
