# SPDX-License-Identifier: GPL-2.0-or-later
"""MAP_SYNC needs a DAX file; mount option, inode flag and block size decide which files are DAX.

A file's DAX state (S_DAX) is fixed from the load of its inode until its eviction. It is decided by
fs/xfs/xfs_iops.c:xfs_inode_should_enable_dax and fs/ext4/inode.c:ext4_should_enable_dax
(Documentation/filesystems/dax.rst). A file that is not DAX fails with the same EOPNOTSUPP as one on
a DIMM that must be flushed by hcall; the probe distinguishes the two.
"""

import errno
import os
import shlex
from dataclasses import dataclass

from paprscm.checks import other_than
from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.map_sync.probe import map_sync
from paprscm.map_sync.verdict import Verdict, judge_map_sync, on_dax_file
from paprscm.pmem.mounts import FsType, dax_mount, make_filesystem, mount, try_mount
from paprscm.pmem.namespaces import BlockDevice, create_fsdax, partition
from paprscm.pmem.regions import read_page_size, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, PMEM_ON
from paprscm.vm.machine import MIB, Machine, Nvdimm

EINVAL = os.strerror(errno.EINVAL)
FIEMAP_EXTENT_SHARED = 0x2000


def flag(fstype: FsType, path: str, sign: str = "+") -> str:
    """Shell command that sets or clears the inode's DAX flag, and checks the result by lsattr."""
    # FS_IOC_FSSETXATTR by xfs_io, FS_IOC_SETFLAGS by chattr: both file systems have both ioctls.
    tool = f"xfs_io -c 'chattr {sign}x'" if fstype == "xfs" else f"chattr {sign}x"
    pattern = "*x*" if sign == "+" else "*[!x]"
    path = shlex.quote(path)
    return (
        f"{tool} {path}; set -- $(lsattr -d {path}); "
        f'case $1 in {pattern}) ;; *) echo "flags are $1" >&2; exit 1 ;; esac'
    )


# The shell itself opens the file: a background program would open it at some later time.
HOLD = "exec 3< file; sleep 600 <&3 > /dev/null 2>&1 & echo $! > /tmp/holder; exec 3<&-"
"""Shell command that keeps the file open, and so its inode in memory."""

RELEASE = "read -r pid < /tmp/holder; kill $pid; while [ -e /proc/$pid ]; do :; done"


@dataclass(frozen=True)
class Row:
    """One step.

    Attributes:
        what: name in reports.
        dax: the file is DAX after the step.
        path: file to probe, below the mount point.
        mount: options of a new mount; None: the file system stays mounted.
        before: shell commands before the probe; "FLAG path" and "UNFLAG path" stand for `flag`.
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
        """Run all steps, and compare the verdict after each."""
        guest = self.boot(Machine(nvdimms=(nvdimm.holding(fstype),)))
        first, *rows = ROWS
        disk = dax_mount(guest, nvdimm.slot, fstype, "/mnt", options=first.mount or "").device.path
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
            # An existing file must keep its inode; the probe creates a new file.
            new = row is first or row.path != "file"
            report = map_sync(guest, f"/mnt/{row.path}", truncate=new)
            self.measure(row.what, report.line)
            expected = on_dax_file(nvdimm) if row.dax else Verdict.NOT_DAX
            self.check_map_sync(row.what, report, expected, fstype=fstype)

    def test_xfs_pmem_on(self) -> None:
        """On XFS over pmem=on, MAP_SYNC is granted where option and flag make the file DAX."""
        self.judge(PMEM_ON, "xfs")

    def test_xfs_pmem_off(self) -> None:
        """On XFS over pmem=off, MAP_SYNC is always refused; option and flag decide about DAX."""
        self.judge(PMEM_OFF, "xfs")

    def test_ext4_pmem_on(self) -> None:
        """On ext4 over pmem=on, MAP_SYNC is granted where option and flag make the file DAX."""
        self.judge(PMEM_ON, "ext4")

    def test_ext4_pmem_off(self) -> None:
        """On ext4 over pmem=off, MAP_SYNC is always refused; option and flag decide about DAX."""
        self.judge(PMEM_OFF, "ext4")


MODES = ("always", "inode", "never")


def dax_options(line: str) -> list[str]:
    """The dax= options in a line of /proc/self/mounts."""
    return [option for option in line.split()[3].split(",") if option.startswith("dax=")]


REMOUNTS = """\
for mode in {modes}; do
	dmesg -C
	message=$(busybox mount -o remount,dax=$mode {disk} {mountpoint} 2>&1)
	complaints=$(dmesg -t | grep -c "can.t change dax mount option")
	echo "$mode|$complaints|$message|$(grep {mountpoint} /proc/self/mounts)"
done
"""


@dataclass(frozen=True)
class RemountResult:
    """Result of a remount with another DAX mode.

    Attributes:
        mode: of the option dax=.
        complaints: number of kernel messages about the remount.
        message: of mount; "" if it succeeded.
        options: the dax= options afterwards.
    """

    mode: str
    complaints: int
    message: str
    options: list[str]


def remount(guest: Guest, disk: str, mountpoint: str) -> list[RemountResult]:
    """Remount with each DAX mode in turn."""
    script = REMOUNTS.format(modes=" ".join(MODES), disk=disk, mountpoint=mountpoint)
    remounts = []
    for line in guest.succeed(script).splitlines():
        mode, complaints, message, mounted = line.split("|")
        remounts.append(RemountResult(mode, int(complaints), message, dax_options(mounted)))
    if [one.mode for one in remounts] != list(MODES):
        raise HostError(f"the guest's shell reports remounts with other modes: {remounts}")
    return remounts


# Without a dax= option, ext4 sets none of its three bits: even dax=inode, which means the same, is
# a change (ext4_check_opt_consistency; EXT4_MOUNT2_DAX_INODE is "strictly for printing").
ALLOWED = {("always", "always"), ("inode", "inode"), ("never", "never")}


class Remount(PaprScmTest):
    """
    The DAX mode of a mounted file system.

    :avocado: tags=map_sync
    """

    def test_dax_stays(self) -> None:
        """A remount, refused or not, changes neither the DAX option nor the MAP_SYNC result.

        So far ext4 refuses, with EINVAL and a message (fs/ext4/super.c, ext4_check_opt_consistency:
        "can't change dax mount option while remounting"), and XFS ignores what it cannot change
        (fs/xfs/xfs_super.c, xfs_fs_reconfigure).
        """
        guest = self.boot(
            Machine(nvdimms=(PMEM_ON.at(0).holding("xfs"), PMEM_ON.at(1).holding("ext4")))
        )
        self.judge(guest, 0, "xfs")
        self.judge(guest, 1, "ext4")

    def judge(self, guest: Guest, slot: int, fstype: FsType) -> None:
        """Mount with each mode, and try to remount with all modes."""
        mountpoint = f"/mnt/{fstype}"
        disk = dax_mount(guest, slot, fstype, mountpoint).device.path
        for first in (*MODES, ""):
            what = f"{fstype} mounted with '{first}'"
            option = f"-o dax={first}" if first else ""
            guest.succeed(f"umount {mountpoint} && mount -t {fstype} {option} {disk} {mountpoint}")
            options = dax_options(guest.succeed(f"grep {mountpoint} /proc/self/mounts"))
            # XFS does not print dax=inode.
            printed = bool(first) and (fstype, first) != ("xfs", "inode")
            self.usual(f"options of {what}", options, [f"dax={first}"] * printed)
            for one in remount(guest, disk, mountpoint):
                self.check(f"{what}, options after '{one.mode}'", one.options, options)
                refused = fstype == "ext4" and (first, one.mode) not in ALLOWED
                answer = (one.message.endswith(EINVAL), bool(one.message), one.complaints)
                self.usual(
                    f"{what}, then '{one.mode}': EINVAL, a message, complaints",
                    answer,
                    (refused, refused, int(refused)),
                )
            report = map_sync(guest, f"{mountpoint}/file")
            expected = Verdict.ACCEPTED if first == "always" else Verdict.NOT_DAX
            self.check_map_sync(f"{what}, after all remounts", report, expected, fstype=fstype)


class BlockSize(PaprScmTest):
    """
    Blocks that are smaller than a page.

    :avocado: tags=map_sync
    """

    def test_small_blocks(self) -> None:
        """A file with blocks smaller than a page is not DAX so far; if it is, it grants MAP_SYNC.

        fs/xfs/xfs_super.c, xfs_setup_dax_always: dax=always becomes dax=never, and the mount
        succeeds. fs/ext4/super.c, ext4_check_feature_compatibility: EINVAL; without the option it
        mounts. The inode's flag changes nothing (xfs_inode_supports_dax, ext4_should_enable_dax).
        """
        guest = self.boot(Machine(nvdimms=(PMEM_ON.holding("fsdax"),)))
        small = 1024 if read_page_size(guest) == 4096 else 4096
        disk = create_fsdax(guest, wait_for_region(guest, 0))
        make_filesystem(guest, disk, "xfs", small)
        always = try_mount(guest, disk, "xfs", "/mnt", options="dax=always")
        self.usual("XFS with small blocks and dax=always", always.errno_name, None)
        message = f"XFS ({disk.name}): DAX not supported for blocksize. Turning off DAX."
        self.usual(f"in the log: {message}", message in always.messages, True)
        if always.errno_name is None:
            # /mnt itself is a tmpfs, which was mounted earlier.
            options = dax_options(guest.succeed("grep ' /mnt ' /proc/self/mounts | tail -n 1"))
            self.usual("option of XFS with small blocks", options, ["dax=never"])
            self.probe(guest, "xfs", "XFS, dax=always")
            guest.succeed("umount /mnt")
        self.mount_flagged(guest, "xfs", disk)
        self.probe(guest, "xfs", "XFS, dax=inode, flag set")
        guest.succeed("umount /mnt")

        make_filesystem(guest, disk, "ext4", small)
        always = try_mount(guest, disk, "ext4", "/mnt", options="dax=always")
        self.usual("ext4 with small blocks and dax=always", always.errno_name, "EINVAL")
        name = f"EXT4-fs ({disk.name})"
        usual = (
            f"{name}: unsupported blocksize for DAX",
            f"{name}: DAX unsupported by block device.",
        )
        self.usual("messages of ext4 with small blocks", always.messages, usual)
        if always.errno_name is None:
            self.probe(guest, "ext4", "ext4, dax=always")
            guest.succeed("umount /mnt")
        self.mount_flagged(guest, "ext4", disk)
        self.probe(guest, "ext4", "ext4, dax=inode, flag set")

    def mount_flagged(self, guest: Guest, fstype: FsType, disk: BlockDevice) -> None:
        """Mount with dax=inode, set the flag of a file, and mount again to reload its inode."""
        mount(guest, disk, fstype, "/mnt", options="dax=inode")
        guest.succeed("set -e; cd /mnt; touch file\n" + flag(fstype, "file"))
        guest.succeed(f"umount /mnt && mount -o dax=inode {disk.path} /mnt")

    def probe(self, guest: Guest, fstype: FsType, what: str) -> None:
        """Check that the file is not DAX or, as the DIMM has pmem=on, grants MAP_SYNC."""
        report = map_sync(guest, "/mnt/file")
        self.measure(what, report.line)
        verdict = judge_map_sync(report).verdict
        self.usual(f"{what}: verdict", verdict.value, Verdict.NOT_DAX.value)
        expected = Verdict.NOT_DAX if verdict is Verdict.NOT_DAX else Verdict.ACCEPTED
        self.check_map_sync(what, report, expected, fstype=fstype)


class Reflink(PaprScmTest):
    """
    Files that share their blocks.

    :avocado: tags=map_sync
    """

    def judge(self, nvdimm: Nvdimm) -> None:
        """Probe files on the whole disk, then on a partition of it."""
        guest = self.boot(Machine(nvdimms=(nvdimm.holding("xfs"),)))
        disk = dax_mount(guest, nvdimm.slot, "xfs", "/mnt").device
        self.on_the_disk(guest, nvdimm)
        guest.succeed("umount /mnt")

        (part,) = partition(guest, disk, [(MIB, disk.size_bytes - 2 * MIB)])
        make_filesystem(guest, part, "xfs", read_page_size(guest))
        always = try_mount(guest, part, "xfs", "/mnt", options="dax=always")
        self.usual("dax=always on a partition with reflink", always.errno_name, "EINVAL")
        name = f"XFS ({part.removeprefix('/dev/')})"
        message = f"{name}: DAX and reflink cannot work with multi-partitions!"
        self.usual(f"in the log: {message}", message in always.messages, True)
        if always.errno_name is None:
            self.probe(guest, nvdimm, "/mnt/new", truncate=True)
            guest.succeed("umount /mnt")
        # Only dax=always is checked at mount; a flagged file is DAX in any case.
        mount(guest, part, "xfs", "/mnt", options="dax=inode")
        guest.succeed("cd /mnt; mkdir dir; " + flag("xfs", "dir"))
        self.probe(guest, nvdimm, "/mnt/dir/file", truncate=True)

    def on_the_disk(self, guest: Guest, nvdimm: Nvdimm) -> None:
        """Check that a file and its clone are DAX, and that a store stays in its own file."""
        self.probe(guest, nvdimm, "/mnt/file", truncate=True)
        before = guest.succeed(
            "set -e; cd /mnt; cp --reflink=always file clone; busybox cmp file clone; sync; "
            "cksum < clone; xfs_io -r -c 'fiemap -v' clone"
        ).splitlines()
        # The flags of each extent (include/uapi/linux/fiemap.h).
        flags = [int(word, 16) for line in before for word in line.split()[-1:] if word[:2] == "0x"]
        if not flags:
            raise HostError(f"no flags in the output of xfs_io: {before}")
        if not flags[0] & FIEMAP_EXTENT_SHARED:
            raise ContractError(f"the clone does not share blocks: {before}")
        self.probe(guest, nvdimm, "/mnt/file", truncate=False)
        after = guest.succeed("cd /mnt; cksum < clone; cksum < file").splitlines()
        self.check("clone's checksum after a store into the file", after[0], before[0])
        self.check("file's checksum after a store into it", after[1], other_than(before[0]))
        self.probe(guest, nvdimm, "/mnt/clone", truncate=False)

    def probe(self, guest: Guest, nvdimm: Nvdimm, path: str, *, truncate: bool) -> None:
        """Check that the file is DAX, and that the backend decides about MAP_SYNC."""
        report = map_sync(guest, path, truncate=truncate)
        self.measure(f"probe {path}, truncate {truncate}", report.line)
        self.check_map_sync(path, report, on_dax_file(nvdimm), fstype="xfs")

    def test_pmem_on(self) -> None:
        """XFS on pmem=on grants MAP_SYNC on a clone, and on a partition if it has DAX there.

        fs/xfs/xfs_super.c, xfs_setup_dax_always: so far dax=always is EINVAL on a partition, unless
        mkfs had reflink=0. The store's fault copies the shared block (xfs_dax_write_iomap_ops).
        """
        self.judge(PMEM_ON)

    def test_pmem_off(self) -> None:
        """XFS on pmem=off has DAX on a clone and refuses MAP_SYNC; on a partition too."""
        self.judge(PMEM_OFF)
