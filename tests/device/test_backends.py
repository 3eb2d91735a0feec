# SPDX-License-Identifier: GPL-2.0-or-later
"""Files behind a DIMM that cannot keep what they are given: what a guest that syncs gets.

QEMU accepts each of them silently (tests/device/test_validation.py). Here a guest stores, syncs and
gets success; and the host looks into the file. A DIMM with a raw namespace begins where
its file does, so what the guest wrote to the start of the disk must be at the start of the file.
"""

from __future__ import annotations

import mmap
import os
import signal
import tempfile
from pathlib import Path

from paprscm.errors import GuestLostError, HostError
from paprscm.flush.syscalls import persist
from paprscm.flush.trace import count_hcalls
from paprscm.guest.guest import Guest
from paprscm.host.process import describe_status, run
from paprscm.pmem.namespaces import create_namespace
from paprscm.pmem.regions import wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.machine import MIB, Machine, Nvdimm
from paprscm.vm.sync_shim import Operation, Shim, WatchedFile

PAGE = 65536
SMALL = 256 * MIB
GOOD = Nvdimm(slot=1, size_bytes=SMALL)
"""The control, in the same guest."""
MAP_SHARED_VALIDATE, MAP_SYNC = 0x03, 0x80000


class Backends(PaprScmTest):
    """
    A backend that cannot keep what it is given.

    :avocado: tags=flush
    """

    def machine(self, *nvdimms: Nvdimm) -> Guest:
        """A guest whose syncs are watched."""
        self.watcher: Shim = self.shim()
        return self.boot(Machine(nvdimms=nvdimms), shim=self.watcher)

    def disk(self, guest: Guest, slot: int) -> str:
        """A raw namespace of the whole DIMM; its disk."""
        found = wait_for_region(guest, slot, 20)
        return create_namespace(guest, found, mode="raw").disk.path

    def stored(self, guest: Guest, disk: str, byte: int, syncs: WatchedFile) -> None:
        """Write a page to the start of a disk and sync it, which must be told to be well."""
        before = syncs.counts().ended
        made = persist(guest, disk, f"write=0:{PAGE}:{byte}", "fsync", f"store=1:1:{byte}", "fsync")
        self.assertEqual([str(step) for step in made if step.errno], [])
        count = syncs.counts().ended - before
        self.assertGreaterEqual(count, 2)
        self.usual("syncs of two fsyncs", count, 2)

    def begins(self, file: Path) -> set[int]:
        """What bytes the first page of a file has."""
        with file.open("rb") as opened:
            return set(opened.read(PAGE))

    def test_share_off(self) -> None:
        """What a guest has synced is in the file, with share=off, too."""
        private = Nvdimm(slot=2, size_bytes=SMALL, share=False)
        guest = self.machine(GOOD, private)
        for nvdimm in (GOOD, private):
            disk = self.disk(guest, nvdimm.slot)
            self.stored(guest, disk, 0xA5, guest.vm.syncs(nvdimm.slot))
        self.assertEqual(self.begins(guest.file(GOOD.slot)), {0xA5})
        found = self.begins(guest.file(private.slot))
        blocks = guest.file(private.slot).stat().st_blocks
        self.known_issue(
            "qemu-nvdimm-share-off",
            shows=found != {0xA5},
            found=f"two fsyncs succeeded, two fdatasyncs were made, the file has {blocks} blocks",
        )

    def test_memfd(self) -> None:
        """What a guest has synced is in a file that another QEMU can open."""
        guest, volatile = self.machine(GOOD), Nvdimm(slot=2, size_bytes=SMALL)
        backend = {"qom-type": "memory-backend-memfd", "id": "mem2", "size": volatile.file_bytes}
        guest.qmp.execute("object-add", **backend)
        fds = Path(f"/proc/{guest.process.pid}/fd")
        files = [fd for fd in fds.iterdir() if "memory-backend-memfd" in str(fd.readlink())]
        if len(files) != 1:
            raise HostError(f"QEMU has {len(files)} files for one memory-backend-memfd")
        # It is mapped already; but only msync and pmem_persist would have to know where.
        syncs = self.watcher.watch(files[0])
        guest.qmp.execute("device_add", **volatile.frontend())
        self.stored(guest, self.disk(guest, volatile.slot), 0xA5, syncs)
        self.assertEqual(syncs.counts(Operation.FDATASYNC).ended, syncs.counts().ended)
        self.assertEqual(self.begins(files[0]), {0xA5})
        names = files[0].stat().st_nlink
        self.known_issue(
            "qemu-nvdimm-on-volatile-file",
            shows=not names,
            found=f"two fsyncs succeeded, and the file they went to has {names} names",
        )

    def test_file_used_twice(self) -> None:
        """What a guest has synced to one DIMM is not overwritten through another."""
        scratch = self.leave.enter_context(
            tempfile.TemporaryDirectory(prefix="paprscm-", dir=self.settings.scratch_dir)
        )
        file = Path(scratch) / "both"
        file.touch()
        os.truncate(file, GOOD.file_bytes)
        first, second = (Nvdimm(slot=slot, size_bytes=SMALL, file=file) for slot in (2, 3))
        guest = self.machine(GOOD, first, second)
        good, *disks = (self.disk(guest, nvdimm.slot) for nvdimm in (GOOD, first, second))
        self.assertIs(guest.vm.syncs(2), guest.vm.syncs(3))
        self.stored(guest, good, 0x33, guest.vm.syncs(GOOD.slot))
        for disk, byte in zip(disks, (0xA5, 0x5A), strict=True):
            self.stored(guest, disk, byte, guest.vm.syncs(2))
        guest.succeed("echo 3 > /proc/sys/vm/drop_caches")
        read = f"read=0:{PAGE}"
        (kept,) = persist(guest, good, read)
        self.assertEqual(kept.byte, 0x33)
        (found,) = persist(guest, disks[0], read)
        self.known_issue(
            "qemu-nvdimm-file-used-twice",
            shows=found.byte != 0xA5,
            found=f"0xa5 was synced to the first DIMM, 0x5a to the second; the first has "
            f"{found.byte:#x}",
        )

    def test_pmem_override(self) -> None:
        """With pmem-override on a file that is not DAX, a flush asks the host to sync it."""
        override = Nvdimm(slot=2, size_bytes=SMALL, pmem=True, pmem_override=True)
        guest = self.machine(GOOD, override)
        with guest.file(override.slot).open("r+b") as file:
            try:
                mmap.mmap(file.fileno(), mmap.PAGESIZE, flags=MAP_SHARED_VALIDATE | MAP_SYNC)
            except OSError:
                pass
            else:
                self.cancel(f"{self.settings.scratch_dir} is persistent memory")
        counts = {}
        for nvdimm in (GOOD, override):
            disk, syncs = self.disk(guest, nvdimm.slot), guest.vm.syncs(nvdimm.slot)
            hcalls = count_hcalls(guest)
            self.stored(guest, disk, 0xA5, syncs)
            # Both ask the hypervisor.
            self.assertGreaterEqual(count_hcalls(guest) - hcalls, 4)
            ended = {o.name.lower(): syncs.counts(o).ended for o in Operation}
            counts[nvdimm] = {name: count for name, count in ended.items() if count}
        self.measure("calls of two fsyncs", list(counts.values()))
        self.assertGreaterEqual(sum(counts[GOOD].values()), 2)
        self.usual("calls of two fsyncs on pmem=off", counts[GOOD], {"fdatasync": 2})
        self.known_issue(
            "qemu-pmem-override-syncs-nothing",
            shows=set(counts[override]) == {"pmem_persist"},
            found=f"two fsyncs succeeded, and all that QEMU called is {counts[override]}",
        )

    def expect_store_to_end(self, guest: Guest, disk: str, cause: str, *steps: str) -> None:
        """Make stores that the host cannot take, and see what becomes of the machine."""
        # At the host's file these calls would be EIO or ENOSPC; here there is no call.
        try:
            made = persist(guest, disk, *steps)
        except GuestLostError:
            status = guest.process.wait(10)
            self.assertIsNotNone(status, "the guest is gone, QEMU is not")
            guest.kill()
            assert status is not None
            if status != -signal.SIGBUS:
                raise
            found = f"{cause}, and QEMU ended, {describe_status(status)}"
        else:
            # Whatever else it does, it must not say that all is well.
            self.assertTrue(any(step.errno for step in made), "the guest was told that all is well")
            status, found = 0, f"{cause}, and the guest was told: {', '.join(map(str, made))}"
        self.known_issue("qemu-nvdimm-sigbus", shows=status != 0, found=found)

    def test_truncated(self) -> None:
        """A guest whose DIMM's file was truncated goes on, and is told that its stores fail."""
        guest = self.machine(GOOD)
        disk, syncs = self.disk(guest, GOOD.slot), guest.vm.syncs(GOOD.slot)
        self.stored(guest, disk, 0xA5, syncs)
        os.truncate(guest.file(GOOD.slot), PAGE)
        self.assertEqual(self.begins(guest.file(GOOD.slot)), {0xA5})
        # Of the part that is left, a flush is a flush.
        self.stored(guest, disk, 0x5A, syncs)
        steps = f"write={SMALL // 2}:{PAGE}:1", "fsync"
        self.expect_store_to_end(guest, disk, "the file was truncated", *steps)
        self.assertEqual(self.begins(guest.file(GOOD.slot)), {0x5A})

    def test_full_file_system(self) -> None:
        """A guest whose DIMM's file finds no room goes on, and is told that its stores fail.

        What was synced before is in the file.
        """
        if os.geteuid() != 0:
            self.cancel("only root can mount a small file system")
        place = Path(tempfile.mkdtemp(prefix="paprscm-", dir=self.settings.scratch_dir))
        self.leave.callback(place.rmdir)
        mounting = ["mount", "-t", "tmpfs", "-o", "size=8m", "paprscm", str(place)]
        try:
            run(mounting, timeout_s=20)
        except HostError as error:
            self.cancel(f"this root cannot mount: {error}")
        self.leave.callback(run, ["umount", place], timeout_s=20)
        file = place / "dimm"
        file.touch()
        os.truncate(file, GOOD.file_bytes)
        dimm = Nvdimm(slot=2, size_bytes=SMALL, file=file)
        guest = self.machine(dimm)
        disk = self.disk(guest, dimm.slot)
        self.stored(guest, disk, 0xA5, guest.vm.syncs(dimm.slot))
        size = 16 * MIB
        self.assertGreater(size, os.statvfs(place).f_bavail * os.statvfs(place).f_frsize)
        steps = f"write={PAGE}:{size}:1", "fsync"
        self.expect_store_to_end(guest, disk, "the host's file system is full", *steps)
        self.assertEqual(self.begins(file), {0xA5})
