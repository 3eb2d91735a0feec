# SPDX-License-Identifier: GPL-2.0-or-later
"""MAP_SYNC needs a DAX file: which files are DAX, by mount option, inode flag and block size.

A file is DAX (S_DAX) or not from the moment that its inode is loaded until it is evicted; what
decides is fs/xfs/xfs_iops.c:xfs_inode_should_enable_dax and fs/ext4/inode.c:ext4_should_enable_dax
(Documentation/filesystems/dax.rst). A file that is not DAX fails with the same EOPNOTSUPP as one on
a DIMM that must be flushed by hcall: the probe tells them apart.
"""

import errno
import os
import shlex
from dataclasses import dataclass

from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.map_sync.probe import map_sync
from paprscm.map_sync.verdict import MapSyncReport, Verdict, judge
from paprscm.pmem.mounts import FsType, dax_mount, make_filesystem, mount, try_mount
from paprscm.pmem.namespaces import BlockDevice, create_fsdax, partition
from paprscm.pmem.regions import page_size, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.machine import MIB, Machine, Nvdimm

EINVAL = os.strerror(errno.EINVAL)
FIEMAP_EXTENT_SHARED = 0x2000


def by_backend(nvdimm: Nvdimm) -> Verdict:
    """The verdict for a file that is DAX (drivers/nvdimm/pmem.c, pmem_attach_disk)."""
    return Verdict.ACCEPTED if nvdimm.pmem else Verdict.REFUSED


def differs(report: MapSyncReport, fstype: FsType, wanted: Verdict) -> str:
    """What is wrong with a report; empty if nothing.

    That a file is not DAX proves something only if it is on the file system in question, and not
    below a mount point where nothing is mounted.
    """
    found = judge(report)
    if report.file is None or report.file.fs_name != fstype:
        return f"{report.path} is not on {fstype}: {found}"
    return "" if found.verdict is wanted else f"expected {wanted.value}, found {found}"


def flag(fstype: FsType, path: str, sign: str = "+") -> str:
    """Shell that sets or clears the inode's DAX flag, and proves by lsattr that it did."""
    # FS_IOC_FSSETXATTR by xfs_io, FS_IOC_SETFLAGS by chattr: each file system has both.
    tool = f"xfs_io -c 'chattr {sign}x'" if fstype == "xfs" else f"chattr {sign}x"
    wanted = "*x*" if sign == "+" else "*[!x]"
    path = shlex.quote(path)
    return (
        f"{tool} {path}; set -- $(lsattr -d {path}); "
        f'case $1 in {wanted}) ;; *) echo "flags are $1" >&2; exit 1 ;; esac'
    )


# Opened by the shell itself: a program in the background would do so at a time of its own.
HOLD = "exec 3< file; sleep 600 <&3 > /dev/null 2>&1 & echo $! > /tmp/holder; exec 3<&-"
"""Keeps the file open, and so its inode in memory."""

RELEASE = "read -r pid < /tmp/holder; kill $pid; while [ -e /proc/$pid ]; do :; done"


@dataclass(frozen=True)
class Row:
    """One step.

    Attributes:
        what: in words, for the report.
        dax: the file is DAX then.
        path: the file that is probed, below the mount point.
        mount: options to mount the file system with, anew; None: it stays mounted.
        before: shell, before the probe; "FLAG path" and "UNFLAG path" stand for `flag`.
    """

    what: str
    dax: bool
    path: str = "file"
    mount: str | None = None
    before: tuple[str, ...] = ()


ROWS = (
    Row("dax=always", True, mount="dax=always"),
    Row("dax=inode, no flag", False, mount="dax=inode"),
    Row("dax=inode, flag set, inode still in memory", False, before=(HOLD, "FLAG file")),
    Row("dax=inode, flag set, inode loaded again", True, before=(RELEASE,)),
    Row("dax=inode, new in a flagged folder", True, "dir/new", before=("mkdir dir", "FLAG dir")),
    Row("dax=never, flag set", False, mount="dax=never"),
    Row("no option, flag set", True, mount=""),
    Row("no option, flag cleared, inode still in memory", True, before=(HOLD, "UNFLAG file")),
    Row("no option, flag cleared, inode loaded again", False, before=(RELEASE,)),
)


class DaxModes(PaprScmTest):
    """
    Each dax= option, and the flag of the inode, on one file system.

    :avocado: tags=map_sync
    """

    def judge(self, nvdimm: Nvdimm, fstype: FsType) -> None:
        """Take all steps, and name each that has another verdict."""
        guest = self.boot(Machine(nvdimms=(nvdimm,)))
        first, *rows = ROWS
        disk = dax_mount(guest, nvdimm.slot, fstype, "/mnt", options=first.mount or "").device.path
        wrong = []
        for row in (first, *rows):
            steps = []
            if row.mount is not None and row is not first:
                options = f"-o {row.mount}" if row.mount else ""
                steps += ["cd /", "umount /mnt", f"mount -t {fstype} {options} {disk} /mnt"]
            steps.append("cd /mnt")
            for step in row.before:
                word, _, path = step.partition(" ")
                signs = {"FLAG": "+", "UNFLAG": "-"}
                steps.append(flag(fstype, path, signs[word]) if word in signs else step)
            if len(steps) > 1:
                guest.succeed("set -e\n" + "\n".join(steps))
            # A file that is there keeps its inode; a new one is made by the probe.
            new = row is first or row.path != "file"
            report = map_sync(guest, f"/mnt/{row.path}", truncate=new)
            self.measure(row.what, report.line)
            wanted = by_backend(nvdimm) if row.dax else Verdict.NOT_DAX
            if problem := differs(report, fstype, wanted):
                wrong.append(f"{row.what}: {problem}")
        if wrong:
            self.fail(f"{len(wrong)} of {len(ROWS)} rows:\n  " + "\n  ".join(wrong))

    def test_xfs_pmem_on(self) -> None:
        """On XFS over pmem=on, MAP_SYNC is granted where option and flag make the file DAX."""
        self.judge(Nvdimm(pmem=True), "xfs")

    def test_xfs_pmem_off(self) -> None:
        """On XFS over pmem=off, no option and no flag gets MAP_SYNC, and DAX is as on pmem=on."""
        self.judge(Nvdimm(), "xfs")

    def test_ext4_pmem_on(self) -> None:
        """On ext4 over pmem=on, MAP_SYNC is granted where option and flag make the file DAX."""
        self.judge(Nvdimm(pmem=True), "ext4")

    def test_ext4_pmem_off(self) -> None:
        """On ext4 over pmem=off, no option and no flag gets MAP_SYNC, and DAX is as on pmem=on."""
        self.judge(Nvdimm(), "ext4")


MODES = ("always", "inode", "never")


def dax_options(line: str) -> list[str]:
    """The options about DAX in a line of /proc/self/mounts."""
    return [option for option in line.split()[3].split(",") if option.startswith("dax=")]


# With "" for no option at all, ext4 has none of its three bits: even dax=inode, which means the
# same, is a change (ext4_check_opt_consistency; EXT4_MOUNT2_DAX_INODE is "strictly for printing").
ALLOWED = {("always", "always"), ("inode", "inode"), ("never", "never")}


class Remount(PaprScmTest):
    """
    What mount -o remount can change.

    :avocado: tags=map_sync
    """

    def test_dax_stays(self) -> None:
        """A remount changes no DAX mode, refused or not: options and MAP_SYNC stay as they are.

        So far ext4 refuses, with EINVAL and a message (fs/ext4/super.c, ext4_check_opt_consistency:
        "can't change dax mount option while remounting"), and XFS ignores what it cannot change
        (fs/xfs/xfs_super.c, xfs_fs_reconfigure).
        """
        dimms = (Nvdimm(slot=0, pmem=True), Nvdimm(slot=1, pmem=True))
        guest = self.boot(Machine(nvdimms=dimms))
        wrong: list[str] = []
        kinds: tuple[FsType, ...] = ("xfs", "ext4")
        for slot, fstype in enumerate(kinds):
            wrong += self.judge(guest, slot, fstype)
        if wrong:
            self.fail("\n  ".join(["remounting:", *wrong]))

    def judge(self, guest: Guest, slot: int, fstype: FsType) -> list[str]:
        """Try all changes from each mode; what is wrong with options and verdict after them."""
        mountpoint = f"/mnt/{fstype}"
        disk = dax_mount(guest, slot, fstype, mountpoint).device.path
        wrong = []
        for first in (*MODES, ""):
            # The options; then each line: the mode asked for, dmesg's complaints, mount's message,
            # the options after.
            before, *lines = guest.succeed(
                f"umount {mountpoint}; mount -t {fstype} {f'-o dax={first}' if first else ''} "
                f"{disk} {mountpoint} || exit; grep {mountpoint} /proc/self/mounts; "
                f"for then in {' '.join(MODES)}; do dmesg -C; "
                f"said=$(busybox mount -o remount,dax=$then {disk} {mountpoint} 2>&1); "
                'echo "$then|$(dmesg -t | grep -c "can.t change dax mount option")|$said|'
                f'$(grep {mountpoint} /proc/self/mounts)"; done'
            ).splitlines()
            # XFS does not print dax=inode.
            printed = bool(first) and (fstype, first) != ("xfs", "inode")
            what = f"{fstype} mounted with '{first}'"
            self.usual(f"options of {what}", dax_options(before), [f"dax={first}"] * printed)
            for then, line in zip(MODES, lines, strict=True):
                asked, complaints, said, mounted = line.split("|")
                if asked != then:
                    raise HostError(f"{then!r} was asked for: {line}")
                if dax_options(mounted) != dax_options(before):
                    wrong.append(f"{fstype}, from '{first}' to '{then}': {before}, then {line}")
                refused = fstype == "ext4" and (first, then) not in ALLOWED
                answer = (said.endswith(EINVAL), bool(said), complaints)
                usual = (refused, refused, str(int(refused)))
                self.usual(f"{what}, then '{then}': EINVAL, a message, complaints", answer, usual)
            report = map_sync(guest, f"{mountpoint}/file")
            wanted = Verdict.ACCEPTED if first == "always" else Verdict.NOT_DAX
            if problem := differs(report, fstype, wanted):
                wrong.append(f"{fstype}, after all from '{first}': {problem}")
        return wrong


class BlockSize(PaprScmTest):
    """
    Blocks that are smaller than a page.

    :avocado: tags=map_sync
    """

    def test_small_blocks(self) -> None:
        """With blocks smaller than a page a file is not DAX, so far; if it is, MAP_SYNC is granted.

        fs/xfs/xfs_super.c, xfs_setup_dax_always: dax=always becomes dax=never, and the mount
        succeeds. fs/ext4/super.c, ext4_check_feature_compatibility: EINVAL; without the option it
        mounts. The inode's flag changes nothing (xfs_inode_supports_dax, ext4_should_enable_dax).
        """
        guest = self.boot(Machine(nvdimms=(Nvdimm(pmem=True),)))
        small = 1024 if page_size(guest) == 4096 else 4096
        disk = create_fsdax(guest, wait_for_region(guest, 0, 10))
        make_filesystem(guest, disk, "xfs", small)
        always = try_mount(guest, disk, "xfs", "/mnt", options="dax=always")
        self.usual("XFS with small blocks and dax=always", always.errno_name, None)
        message = f"XFS ({disk.name}): DAX not supported for blocksize. Turning off DAX."
        self.usual(f"in the log: {message}", message in always.messages, True)
        if always.errno_name is None:
            # /mnt itself is a tmpfs, which was mounted earlier.
            options = dax_options(guest.succeed("grep ' /mnt ' /proc/self/mounts | tail -n 1"))
            self.usual("option of XFS with small blocks", options, ["dax=never"])
            self.expect(guest, "xfs", "XFS, dax=always")
            guest.succeed("umount /mnt")
        self.mount_flagged(guest, "xfs", disk)
        self.expect(guest, "xfs", "XFS, dax=inode, flag set")
        guest.succeed("umount /mnt")

        make_filesystem(guest, disk, "ext4", small)
        always = try_mount(guest, disk, "ext4", "/mnt", options="dax=always")
        self.usual("ext4 with small blocks and dax=always", always.errno_name, "EINVAL")
        name = f"EXT4-fs ({disk.name})"
        wanted = (f"{name}: unsupported blocksize for DAX",)
        wanted = (*wanted, f"{name}: DAX unsupported by block device.")
        self.usual("the log then", always.messages, wanted)
        if always.errno_name is None:
            self.expect(guest, "ext4", "ext4, dax=always")
            guest.succeed("umount /mnt")
        self.mount_flagged(guest, "ext4", disk)
        self.expect(guest, "ext4", "ext4, dax=inode, flag set")

    def mount_flagged(self, guest: Guest, fstype: FsType, disk: BlockDevice) -> None:
        """Mount with dax=inode, a file, and its flag set before its inode is loaded again."""
        mount(guest, disk, fstype, "/mnt", options="dax=inode")
        guest.succeed("set -e; cd /mnt; touch file\n" + flag(fstype, "file"))
        guest.succeed(f"umount /mnt && mount -o dax=inode {disk.path} /mnt")

    def expect(self, guest: Guest, fstype: FsType, what: str) -> None:
        """The file is not DAX; or it is, and the DIMM has pmem=on."""
        report = map_sync(guest, "/mnt/file")
        self.measure(what, report.line)
        verdict = judge(report).verdict
        self.usual(f"{what}: verdict", verdict.value, Verdict.NOT_DAX.value)
        wanted = Verdict.NOT_DAX if verdict is Verdict.NOT_DAX else Verdict.ACCEPTED
        if problem := differs(report, fstype, wanted):
            self.fail(f"{what}: {problem}")


class Reflink(PaprScmTest):
    """
    Files that share their blocks.

    :avocado: tags=map_sync
    """

    def judge(self, nvdimm: Nvdimm) -> None:
        """On the whole disk, then on a partition of it."""
        guest = self.boot(Machine(nvdimms=(nvdimm,)))
        disk = dax_mount(guest, nvdimm.slot, "xfs", "/mnt").device
        self.on_the_disk(guest, nvdimm)
        guest.succeed("umount /mnt")

        (part,) = partition(guest, disk, [(MIB, disk.size_bytes - 2 * MIB)])
        make_filesystem(guest, part, "xfs", page_size(guest))
        always = try_mount(guest, part, "xfs", "/mnt", options="dax=always")
        self.usual("dax=always on a partition with reflink", always.errno_name, "EINVAL")
        name = f"XFS ({part.removeprefix('/dev/')})"
        said = f"{name}: DAX and reflink cannot work with multi-partitions!"
        self.usual(f"in the log: {said}", said in always.messages, True)
        if always.errno_name is None:
            self.expect(guest, nvdimm, "/mnt/new", truncate=True)
            guest.succeed("umount /mnt")
        # Only dax=always is looked at: a flagged file is DAX anyway.
        mount(guest, part, "xfs", "/mnt", options="dax=inode")
        guest.succeed("cd /mnt; mkdir dir; " + flag("xfs", "dir"))
        self.expect(guest, nvdimm, "/mnt/dir/file", truncate=True)

    def on_the_disk(self, guest: Guest, nvdimm: Nvdimm) -> None:
        """A file and its clone are DAX, and a store into one does not reach the other."""
        self.expect(guest, nvdimm, "/mnt/file", truncate=True)
        before = guest.succeed(
            "set -e; cd /mnt; cp --reflink=always file clone; busybox cmp file clone; sync; "
            "cksum < clone; xfs_io -r -c 'fiemap -v' clone"
        ).splitlines()
        # The flags of each extent (include/uapi/linux/fiemap.h).
        flags = [int(word, 16) for line in before for word in line.split()[-1:] if word[:2] == "0x"]
        if not flags:
            raise HostError(f"xfs_io prints no flags: {before}")
        if not flags[0] & FIEMAP_EXTENT_SHARED:
            raise ContractError(f"the clone shares no blocks: {before}")
        self.expect(guest, nvdimm, "/mnt/file", truncate=False)
        after = guest.succeed("cd /mnt; cksum < clone; cksum < file").splitlines()
        self.assertEqual(after[0], before[0], "a store into a file reached its clone")
        self.assertNotEqual(after[1], before[0])
        self.expect(guest, nvdimm, "/mnt/clone", truncate=False)

    def expect(self, guest: Guest, nvdimm: Nvdimm, path: str, *, truncate: bool) -> None:
        """The file is DAX, and the backend decides on MAP_SYNC."""
        report = map_sync(guest, path, truncate=truncate)
        self.measure(f"probe {path}, truncate {truncate}", report.line)
        if problem := differs(report, "xfs", by_backend(nvdimm)):
            self.fail(problem)

    def test_pmem_on(self) -> None:
        """XFS on pmem=on grants MAP_SYNC on a clone; on a partition too, where it has DAX.

        fs/xfs/xfs_super.c, xfs_setup_dax_always: so far dax=always is EINVAL on a partition, unless
        mkfs had reflink=0. The store's fault copies the shared block (xfs_dax_write_iomap_ops).
        """
        self.judge(Nvdimm(pmem=True))

    def test_pmem_off(self) -> None:
        """XFS on pmem=off has DAX on a clone and refuses MAP_SYNC; on a partition too."""
        self.judge(Nvdimm())
