# SPDX-License-Identifier: GPL-2.0-or-later
"""Failing syncs on the host: errors in the guest, file systems, and the data afterwards.

QEMU answers H_HARDWARE for every errno (hw/ppc/spapr_nvdimm.c, flush_worker_cb). Linux logs it and
turns it into EIO (arch/powerpc/platforms/pseries/papr_scm.c, papr_scm_pmem_flush;
drivers/nvdimm/region_devs.c, nvdimm_flush). The caller of the flush gets EIO as the status of a bio
(drivers/nvdimm/pmem.c, pmem_submit_bio) or from blkdev_issue_flush.

Each failure is counted twice: by the shim in QEMU, and in the driver's log.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable

from paprscm.checks import above, at_least, containing, matching, one_of, other_than
from paprscm.errors import ContractError, GuestLostError
from paprscm.flush.syscalls import Syscall, persist
from paprscm.flush.trace import count_hcalls
from paprscm.guest.guest import Guest
from paprscm.pmem.fs_health import check_offline, complaints
from paprscm.pmem.mounts import DaxMount, FsType, dax_mount, mount
from paprscm.pmem.namespaces import create_namespace
from paprscm.pmem.regions import Nmem, find_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import FOR_XFS, PMEM_OFF, SMALL
from paprscm.vm.machine import Machine, Nvdimm

ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
PAGE = 65536
# kmsg.py takes "flush error: -1" for a driver's error.
FLUSH_ERROR = r"papr_scm \S+: flush error: -1$"
DIMM, OTHER = PMEM_OFF.at(3, SMALL), PMEM_OFF.at(1, SMALL)
LARGE = PMEM_OFF.at(3, FOR_XFS)


class FlushErrors(PaprScmTest):
    """
    A flush that fails.

    :avocado: tags=flush
    """

    def machine(self, *nvdimms: Nvdimm) -> Guest:
        """Boot a guest whose flushes can be made to fail."""
        return self.boot(Machine(nvdimms=nvdimms), allowed=[FLUSH_ERROR], shim=self.shim())

    def logged(self, guest: Guest, nvdimm: Nvdimm) -> int:
        """Number of flush errors that the driver has logged for this DIMM."""
        line = rf"papr_scm \S*pmemory@{nvdimm.drc:x}: flush error: -1$"
        return len(re.findall(line, guest.succeed("dmesg"), re.MULTILINE))

    def failing(
        self,
        guest: Guest,
        nvdimm: Nvdimm,
        number: int,
        path: str,
        *steps: str,
    ) -> tuple[Syscall, ...]:
        """Run steps while syncs fail with this errno; return their results."""
        syncs = guest.vm.syncs(nvdimm.slot)
        logged, before = self.logged(guest, nvdimm), syncs.counts()
        syncs.fail(number)
        results = persist(guest, path, *steps)
        syncs.clear()
        after = syncs.counts()
        failed = after.failed - before.failed
        self.expect("syncs that failed", failed, above(0))
        self.expect("syncs, of which all must fail", after.begun - before.begun, failed)
        if (lines := self.logged(guest, nvdimm) - logged) != failed:
            self.remark(f"the driver logged {lines} flush errors of {failed}")
        return results

    def expect_eio(self, results: tuple[Syscall, ...]) -> None:
        """Check that steps that promise durability failed with EIO, and the others succeeded."""
        for step in results:
            expected = 0 if step.step in ("write", "store", "read") else errno.EIO
            self.check(f"errno of {step.step}", step.errno, expected)

    def synced(self, guest: Guest, nvdimm: Nvdimm, path: str, *steps: str) -> tuple[Syscall, ...]:
        """Run steps that must succeed; each flush must reach the host's sync."""
        syncs = guest.vm.syncs(nvdimm.slot)
        before = syncs.counts()
        results = persist(guest, path, *steps)
        after = syncs.counts()
        self.expect("steps with an error", [str(step) for step in results if step.errno], [])
        flushes = sum(step.step not in ("write", "store", "read") for step in results)
        self.check("syncs", after.begun - before.begun, at_least(flushes))
        outcome = (after.ended, after.failed)
        self.check("syncs that ended and failed", outcome, (after.begun, before.failed))
        return results

    def test_region(self) -> None:
        """deep_flush fails with EIO for EIO, ENOSPC, EDQUOT on the host; other flushes succeed."""
        guest = self.machine(DIMM, OTHER)
        paths = {n: f"{find_region(guest, n.slot).device}/deep_flush" for n in (DIMM, OTHER)}
        flush = "dwrite=0:1:49"
        for number in ERRORS:
            self.expect_eio(self.failing(guest, DIMM, number, paths[DIMM], flush, flush))
            self.synced(guest, OTHER, paths[OTHER], flush)
            self.synced(guest, DIMM, paths[DIMM], flush)
        # A flush fails if and only if its sync failed.
        syncs, hcalls = guest.vm.syncs(DIMM.slot), count_hcalls(guest)
        before = syncs.counts()
        syncs.fail(errno.EIO, every=3)
        results = persist(guest, paths[DIMM], *[flush] * 12)
        syncs.clear()
        after = syncs.counts()
        self.check("errnos", [step.errno for step in results], [0, 0, errno.EIO] * 4)
        figures = (after.begun - before.begun, after.failed - before.failed)
        self.check("syncs, and those that failed", figures, (12, 4))
        self.check("hcalls of 12 flushes", count_hcalls(guest) - hcalls, at_least(2 * 12))
        self.check("flush errors logged for the other DIMM", self.logged(guest, OTHER), 0)
        output = guest.vm.output()
        for text in ("Input/output error", "No space left on device", "Disk quota exceeded"):
            self.check("QEMU's output", output, containing(text))

    def test_block_device(self) -> None:
        """On /dev/pmemN, fsync, fdatasync, msync and O_DSYNC return EIO while host syncs fail."""
        guest = self.machine(DIMM)
        namespace = create_namespace(guest, find_region(guest, DIMM.slot), mode="raw")
        path = namespace.disk.path
        for byte, number in enumerate(ERRORS, 1):
            steps = [f"write=0:{PAGE}:{byte}", "fsync", "fsync", "fdatasync"]
            steps += [f"dwrite={PAGE}:{PAGE}:{byte}", f"store=0:{PAGE}:{byte}", f"msync=0:{PAGE}"]
            self.expect_eio(self.failing(guest, DIMM, number, path, *steps))
            *_, after_sync = self.synced(guest, DIMM, path, "fsync", f"read=0:{2 * PAGE}")
            self.check("byte on the disk", after_sync.byte, byte)

    def dimm(self, guest: Guest, nvdimm: Nvdimm) -> Nmem:
        """The DIMM in the guest's sysfs."""
        dimm = find_region(guest, nvdimm.slot).dimm
        if dimm is None:
            raise ContractError(f"the region of slot {nvdimm.slot} has no DIMM")
        return dimm

    def test_health(self) -> None:
        """A DIMM whose flushes fail is not reported as healthy."""
        unarmed = Nvdimm(slot=5, size_bytes=SMALL, unarmed=True)
        guest = self.machine(DIMM, OTHER, unarmed)
        regions = {nvdimm: find_region(guest, nvdimm.slot) for nvdimm in (DIMM, unarmed)}
        path = f"{regions[DIMM].device}/deep_flush"
        self.expect_eio(self.failing(guest, DIMM, errno.EIO, path, *["dwrite=0:1:49"] * 5))
        # papr_scm caches the flags for a minute (papr_scm.c, MIN_HEALTH_QUERY_INTERVAL); ndctl
        # refreshes them: PAPR_PDSM_HEALTH makes a new H_SCM_HEALTH.
        listed = json.loads(guest.succeed("ndctl list -DH"))
        health = {dimm["dev"]: dimm["health"] for dimm in listed}
        flags = {nvdimm: self.dimm(guest, nvdimm).papr_flags for nvdimm in regions}
        # The control: a flag that QEMU does set is visible.
        self.check("flags of the DIMM with unarmed=on", flags[unarmed], {"not_armed"})
        report = health[self.dimm(guest, DIMM).name]
        self.measure("health after failed flushes", report)
        shutdown = (report["shutdown_state"], report["shutdown_count"])
        self.check("shutdown state and count", shutdown, ("clean", 0))
        self.known_issue(
            "qemu-nvdimm-healthy-while-flushes-fail",
            shows=report["health_state"] == "ok" and not flags[DIMM],
            found=f"after five flushes that failed, health is {report['health_state']}, the flags "
            f"are {sorted(flags[DIMM] or ())}",
        )

    def mounted(self, guest: Guest, fstype: FsType) -> DaxMount:
        """Mount a file system whose periodic log writes are minutes apart."""
        options = {"xfs": "dax=always", "ext4": "dax=always,errors=remount-ro,commit=300"}
        if fstype == "xfs":
            guest.succeed("echo 720000 > /proc/sys/fs/xfs/xfssyncd_centisecs")
        return dax_mount(guest, LARGE.slot, fstype, "/mnt/pm", options=options[fstype])

    def mounted_anew(self, guest: Guest, mounted: DaxMount) -> None:
        """Unmount, drop the caches, and mount again."""
        fstype: FsType = "xfs" if mounted.mount.fstype == "xfs" else "ext4"
        guest.succeed("umount /mnt/pm && dmesg -C && echo 3 > /proc/sys/vm/drop_caches")
        mount(guest, mounted.device, fstype, "/mnt/pm")

    def opened(self, guest: Guest, file: str) -> str:
        """Open and close a file; return the failure, or "opened"."""
        try:
            persist(guest, file)
        except GuestLostError:
            raise
        except ContractError as error:
            return str(error)
        return "opened"

    def expect_complaint(self, guest: Guest) -> None:
        """Check that the kernel's log reports an error of the file system."""
        self.check("complaints in the log", complaints(guest.succeed("dmesg")), other_than([]))

    def overwritten(self, fstype: FsType) -> None:
        """Let the flush of overwritten data fail with each errno, in each sync call."""
        guest, file = self.machine(LARGE.holding(fstype)), "/mnt/pm/file"
        mounted = self.mounted(guest, fstype)
        self.synced(guest, LARGE, file, f"write=0:{4 * PAGE}:9", "fsync")
        sync_calls: tuple[Callable[[int, int], list[str]], ...] = (
            lambda at, byte: [f"write={at}:{PAGE}:{byte}", "fdatasync"],
            lambda at, byte: [f"store={at}:{PAGE}:{byte}", f"msync={at}:{PAGE}"],
            lambda at, byte: [f"dwrite={at}:{PAGE}:{byte}"],
        )
        for byte, number in enumerate(ERRORS, 1):
            steps = [
                step
                for place, sync_call in enumerate(sync_calls)
                for step in sync_call(place * PAGE, byte)
            ]
            self.expect_eio(self.failing(guest, LARGE, number, file, *steps))
            # The first sync after a failure must flush, although the page cache is clean.
            self.synced(guest, LARGE, file, "fdatasync", f"msync=0:{PAGE}", "fsync")
        self.mounted_anew(guest, mounted)
        results = persist(guest, file, f"read=0:{3 * PAGE}", f"read={3 * PAGE}:{PAGE}")
        self.check("bytes after a remount", [step.byte for step in results], [len(ERRORS), 9])
        check_offline(guest, [mounted.mount])

    def test_overwritten_xfs(self) -> None:
        """On XFS, fdatasync, msync and O_DSYNC fail with EIO when a flush fails, then retry."""
        self.overwritten("xfs")

    def test_overwritten_ext4(self) -> None:
        """On ext4, fdatasync, msync and O_DSYNC fail with EIO when a flush fails, then retry."""
        self.overwritten("ext4")

    def test_log_xfs(self) -> None:
        """XFS shuts down when its log cannot be flushed; synced data survive."""
        guest, file = self.machine(LARGE.holding("xfs")), "/mnt/pm/file"
        mounted = self.mounted(guest, "xfs")
        self.synced(guest, LARGE, file, f"write=0:{PAGE}:1", "fsync")
        steps = f"write={PAGE}:{PAGE}:2", "fsync", "fsync", "fdatasync"
        self.expect_eio(self.failing(guest, LARGE, errno.ENOSPC, file, *steps))
        self.expect_complaint(guest)
        # The host's syncs work again; the file system stays shut down.
        self.check("opening a file", self.opened(guest, file), containing("cannot be opened: EIO"))
        self.mounted_anew(guest, mounted)
        results = self.synced(guest, LARGE, file, f"read=0:{PAGE}", f"write=0:{PAGE}:3", "fsync")
        self.check("byte after a remount", results[0].byte, 1)
        check_offline(guest, [mounted.mount])

    def test_journal_ext4(self) -> None:
        """ext4 aborts its journal and becomes read-only; synced data survive."""
        guest, file = self.machine(LARGE.holding("ext4")), "/mnt/pm/file"
        mounted = self.mounted(guest, "ext4")
        self.synced(guest, LARGE, file, f"write=0:{PAGE}:1", "fsync")
        results = self.failing(guest, LARGE, errno.EDQUOT, file, f"write={PAGE}:{PAGE}:2", "fsync")
        self.expect_eio(results)
        self.expect_complaint(guest)
        # errors=remount-ro: the next change of the file system is refused. /proc/mounts need not
        # show it, since commit d3476f3dad4a ("ext4: don't set SB_RDONLY after filesystem errors")
        # (in v6.12). Files that were already open: flush/test_promises.py.
        refused = guest.fail("mkdir /mnt/pm/folder")
        self.check("mkdir's error", refused.stderr, containing("Read-only file system"))
        # Linux 6.1.176 opens the file for writing; then fsync decides which data must survive.
        allowed = {1}
        try:
            results = persist(guest, file, f"write=0:{PAGE}:4", "fsync")
        except ContractError as error:
            self.expect("opening a file", str(error), matching("cannot be opened: (EIO|EROFS)"))
        else:
            allowed = {1, 4} if any(step.errno for step in results) else {4}
        self.mounted_anew(guest, mounted)
        (step,) = persist(guest, file, f"read=0:{PAGE}")
        content = (step.result, step.byte)
        self.check("length and byte after a remount", content, (PAGE, one_of(*allowed)))
        # The superblock records the error (s_state, EXT4_ERROR_FS).
        superblock = guest.succeed(f"umount /mnt/pm && dumpe2fs -h {mounted.device.path}")
        state = matching(r"Filesystem state: .*with errors")
        self.check("dumpe2fs", superblock, state)
        guest.succeed(f"dmesg -C; e2fsck -fy {mounted.device.path}; [ $? -le 1 ]")
        mount(guest, mounted.device, "ext4", "/mnt/pm")
        self.synced(guest, LARGE, file, f"write=0:{PAGE}:3", "fsync")
        check_offline(guest, [mounted.mount])
