# SPDX-License-Identifier: GPL-2.0-or-later
"""Data survive a remount if a sync call returned 0 for them, also after a failed flush.

fsync(2), fdatasync(2), msync(2) with MS_SYNC, syncfs(2) and write(2) with O_DSYNC may fail, but
when they return 0, the data and the metadata that are needed to find them are durable. sync(2) has
no result, and so makes no promise.

A failed flush makes ext4 abort its journal and XFS shut down its log. Changes that were not
committed by then never will be. A later sync call must fail, although the host works again and the
call's own flush succeeds.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from paprscm.errors import ContractError, HostError
from paprscm.flush.syscalls import HeldFile, Syscall, persist
from paprscm.guest.guest import Guest
from paprscm.pmem.mounts import DaxMount, FsType, dax_mount, mount
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import FOR_XFS, PMEM_OFF
from paprscm.vm.machine import Machine

PAGE = 65536
FLUSH_ERROR = r"papr_scm \S+: flush error: -1$"
WRITTEN, REWRITTEN = 1, 2
WRITE = f"write=0:{PAGE}:{WRITTEN}"


@dataclass(frozen=True)
class Call:
    """A sync call on a file that no other call touches.

    Attributes:
        before: steps of persist before the flush that fails.
        step: the call, made after the failed flush.
        byte: the file's content when it returns.
    """

    before: tuple[str, ...]
    step: str
    byte: int = WRITTEN


CALLS = {
    "fsync": Call((WRITE,), "fsync"),
    "fdatasync": Call((WRITE,), "fdatasync"),
    "msync": Call((WRITE, f"store=0:{PAGE}:{REWRITTEN}"), f"msync=0:{PAGE}", REWRITTEN),
    # A folder with a new file, "entry".
    "folder": Call((), "fsync"),
    "syncfs": Call((WRITE,), "syncfs"),
    "dwrite": Call((WRITE,), f"dwrite=0:{PAGE}:{REWRITTEN}", REWRITTEN),
}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One file system and the flush on it that fails.

    Attributes:
        nth: number of the flush that fails in one fsync, from 1; None: all of them. A log record
            has one flush before it and one after it.
        calls: keys of CALLS, in the order in which they are made. Only a write starts a
            transaction, and only then ext4 notices that its journal is aborted.
    """

    nth: int | None
    calls: Sequence[str]


SCENARIOS = (
    Scenario(nth=None, calls=tuple(CALLS)),
    Scenario(nth=1, calls=tuple(CALLS)),
    Scenario(nth=2, calls=tuple(reversed(CALLS))),
)


@dataclass(frozen=True)
class Promise:
    """One call, its result, and whether its data survived a remount."""

    name: str
    step: Syscall
    kept: bool

    @property
    def given(self) -> bool:
        """True if the call promised durability."""
        return not self.step.errno

    @property
    def broken(self) -> bool:
        """True if the call promised durability, but the data are lost."""
        return self.given and not self.kept

    def __str__(self) -> str:
        return f"{self.name}: {self.step}" + ("" if self.kept else ", and the data are lost")


class FlushPromises(PaprScmTest):
    """
    Promises of sync calls on a file system whose flush failed.

    :avocado: tags=flush
    """

    def mounted(self, guest: Guest, slot: int, fstype: FsType) -> DaxMount:
        """Mount a file system without periodic log writes or transactions."""
        options = "dax=always,noatime"
        if fstype == "xfs":
            guest.succeed("echo 720000 > /proc/sys/fs/xfs/xfssyncd_centisecs")
        else:
            options += ",errors=remount-ro,commit=300,noinit_itable"
        return dax_mount(guest, slot, fstype, f"/mnt/{slot}", options=options)

    def mounted_anew(self, guest: Guest, mounted: DaxMount, fstype: FsType) -> None:
        """Unmount, drop the caches, and mount again."""
        mountpoint = mounted.mount.mountpoint
        guest.succeed(f"umount {mountpoint} && echo 3 > /proc/sys/vm/drop_caches")
        mount(guest, mounted.device, fstype, mountpoint)

    def kept(self, guest: Guest, mountpoint: str) -> set[str]:
        """Names of the calls whose data are complete after the remount."""
        digest = {b: hashlib.sha256(bytes([b]) * PAGE).hexdigest() for b in (WRITTEN, REWRITTEN)}
        # A lost file is missing, which is not an error of this command.
        listed = guest.run(f"cd {mountpoint} && sha256sum * 2> /dev/null; ls folder").stdout.split()
        content = dict(zip(listed[1::2], listed[::2], strict=False))
        expected = {"trigger": WRITTEN, **{name: call.byte for name, call in CALLS.items()}}
        names = {name for name, byte in expected.items() if content.get(name) == digest[byte]}
        return names | ({"folder"} if "entry" in listed else set())

    def promises(
        self, guest: Guest, slot: int, fstype: FsType, scenario: Scenario
    ) -> tuple[Promise, list[Promise]]:
        """Let a flush fail; return the promises of the call that needed it and of later calls."""
        mounted = self.mounted(guest, slot, fstype)
        mountpoint, syncs = mounted.mount.mountpoint, guest.vm.syncs(slot)
        guest.succeed(f"mkdir {mountpoint}/folder && sync -f {mountpoint}")
        guest.succeed(f"touch {mountpoint}/folder/entry")
        held = {
            name: HeldFile(
                guest, f"{mountpoint}/{name}", *CALLS[name].before, "await", CALLS[name].step
            )
            for name in scenario.calls
        }
        syncs.fail(errno.EIO, nth=scenario.nth)
        *_, trigger = persist(guest, f"{mountpoint}/trigger", WRITE, "fsync")
        syncs.clear()
        if not syncs.counts().failed:
            raise HostError("no sync failed")
        steps = {name: held[name].result()[-1] for name in scenario.calls}
        self.mounted_anew(guest, mounted, fstype)
        kept = self.kept(guest, mountpoint)
        first = Promise("trigger", trigger, "trigger" in kept)
        later = [Promise(name, step, name in kept) for name, step in steps.items()]
        guest.succeed(f"umount {mountpoint}")
        self.measure(f"flush {scenario.nth or 'all'}", [str(first), *map(str, later)])
        return first, later

    def judge(self, fstype: FsType) -> list[Promise]:
        """Run all scenarios, and judge the promises of each.

        Returns:
            Promises of the calls made after a log was aborted or shut down.
        """
        nvdimm = PMEM_OFF.holding(fstype)
        nvdimms = [nvdimm.at(slot, FOR_XFS) for slot in range(len(SCENARIOS))]
        guest = self.boot(Machine(nvdimms=tuple(nvdimms)), allowed=[FLUSH_ERROR], shim=self.shim())
        later_calls: list[Promise] = []
        for slot, scenario in enumerate(SCENARIOS):
            trigger, later = self.promises(guest, slot, fstype, scenario)
            if scenario.nth is None:
                self.expect(f"errno of {scenario}", trigger.step.errno, errno.EIO)
            # The known issues cover calls after an abort. They cover neither the call that waited
            # for the flush, nor a file system that did not notice the failure.
            known = [] if trigger.given else later
            broken = [str(p) for p in (trigger, *later) if p.broken and p not in known]
            if broken:
                raise ContractError(f"{scenario}: {'; '.join(broken)}")
            later_calls += known
        return later_calls

    def aborted(self, issue: str, promises: Sequence[Promise]) -> None:
        """Judge the calls after an abort that this known issue covers."""
        broken = [promise for promise in promises if promise.broken]
        # A promise without lost data proves nothing.
        if broken or all(not promise.given for promise in promises):
            found = "; ".join(map(str, broken)) or "all calls fail"
            self.known_issue(issue, shows=bool(broken), found=f"after the abort, {found}")

    def test_ext4(self) -> None:
        """On an aborted journal of ext4, no sync call returns 0 for lost data."""
        promises = self.judge("ext4")
        syncfs = [promise for promise in promises if promise.name == "syncfs"]
        others = [promise for promise in promises if promise.name != "syncfs"]
        self.aborted("linux-ext4-fsync-ignores-aborted-journal", others)
        self.aborted("linux-ext4-syncfs-ignores-aborted-journal", syncfs)

    def test_xfs(self) -> None:
        """On an XFS log that was shut down, no sync call returns 0 for lost data."""
        promises = self.judge("xfs")
        folders = [promise for promise in promises if promise.name == "folder"]
        broken = [str(p) for p in promises if p not in folders and p.broken]
        self.expect("broken promises", broken, [])
        self.aborted("linux-xfs-folder-fsync-ignores-shutdown", folders)

    def fsync_behind(self, fstype: FsType) -> tuple[Promise, Promise]:
        """Call fsync twice on one file, so that the second waits for an inode lock.

        The first fsync holds the lock shared while its flush, which fails, is in flight. A change
        of the inode waits for the exclusive lock, and the second fsync queues behind the change.
        """
        guest = self.boot(
            Machine(nvdimms=(PMEM_OFF.at(0, FOR_XFS).holding(fstype),)),
            allowed=[FLUSH_ERROR],
            shim=self.shim(),
        )
        mounted = self.mounted(guest, 0, fstype)
        file, syncs = f"{mounted.mount.mountpoint}/fsync", guest.vm.syncs(0)
        first = HeldFile(guest, file, WRITE, "await", "fsync")
        change = HeldFile(guest, file, "await", WRITE)
        second = HeldFile(guest, file, "await", "fsync")
        begun = syncs.counts().begun
        syncs.fail(errno.EIO)
        syncs.hang()
        first.go()
        syncs.wait_begun(begun + 1)
        change.go()
        change.wait_blocked()
        second.go()
        if not second.wait_blocked():
            raise HostError("the second fsync does not wait for the inode lock")
        syncs.clear()
        results = [held.result()[-1] for held in (first, second, change)][:2]
        if results[1].begin_ns > results[0].end_ns:
            raise HostError("the second fsync began too late")
        self.mounted_anew(guest, mounted, fstype)
        kept = "fsync" in self.kept(guest, mounted.mount.mountpoint)
        promises = [Promise("fsync", step, kept) for step in results]
        self.measure("fsync, fsync", list(map(str, promises)))
        return promises[0], promises[1]

    def waiting(self, fstype: FsType) -> Promise:
        """Judge the first of the two fsyncs; return the second."""
        first, second = self.fsync_behind(fstype)
        if first.broken:
            raise ContractError(str(first))
        return second

    def test_waiting_ext4(self) -> None:
        """On ext4, an fsync that waits for a failing fsync does not return 0 for lost data."""
        second = self.waiting("ext4")
        self.check(f"broken promise, {second}", second.broken, False)

    def test_waiting_xfs(self) -> None:
        """On XFS, an fsync that waits for a failing fsync does not return 0 for lost data."""
        second = self.waiting("xfs")
        if second.given and second.kept:
            # As with linux-pmem-loses-preflush-error: the log record was stored.
            return
        self.known_issue(
            "linux-xfs-fsync-ignores-shutdown",
            shows=second.given,
            found=f"while another fsync of the file got EIO, {second}",
        )
