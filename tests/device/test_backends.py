# SPDX-License-Identifier: GPL-2.0-or-later
"""Backing files that cannot keep data, and the result of a guest's sync to them.

QEMU accepts each of them silently (tests/device/test_validation.py). Here a guest stores, syncs and
gets success, and the host reads the file. A DIMM with a raw namespace begins where its file does,
so what the guest wrote to the start of the disk must be at the start of the file.
"""

from __future__ import annotations

import mmap
import os
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

from paprscm.checks import at_least
from paprscm.emulator.qmp import RefusedError
from paprscm.errors import CapabilityError, ContractError, GuestLostError, HostError
from paprscm.flush.syscalls import persist
from paprscm.flush.trace import count_hcalls
from paprscm.guest.guest import Guest
from paprscm.host.process import describe_status, run
from paprscm.pmem.namespaces import create_namespace
from paprscm.pmem.regions import wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import OVERRIDE, PMEM_OFF, SMALL
from paprscm.vm.machine import MIB, Machine, Nvdimm
from paprscm.vm.shim_layout import FLUSHES, Operation
from paprscm.vm.sync_shim import Shim, WatchedFile
from paprscm.vm.vm import StartError

PAGE = 65536
GOOD = PMEM_OFF.at(1, SMALL)
"""The control, in the same guest."""
MAP_SHARED_VALIDATE, MAP_SYNC = 0x03, 0x80000


class Backends(PaprScmTest):
    """
    A backing file that cannot keep data.

    :avocado: tags=flush
    """

    def machine(self, *nvdimms: Nvdimm) -> Guest:
        """Boot a guest whose syncs are watched."""
        self.watcher: Shim = self.shim()
        return self.boot(Machine(nvdimms=nvdimms), shim=self.watcher)

    def disk(self, guest: Guest, slot: int) -> str:
        """Create a raw namespace on the whole DIMM; return its disk."""
        region = wait_for_region(guest, slot)
        return create_namespace(guest, region, mode="raw").disk.path

    def stored(self, guest: Guest, disk: str, byte: int, syncs: WatchedFile) -> None:
        """Write a page to the start of a disk and sync it, which must succeed."""
        before = syncs.counts().ended
        steps = persist(
            guest, disk, f"write=0:{PAGE}:{byte}", "fsync", f"store=1:1:{byte}", "fsync"
        )
        self.expect("steps with an error", [str(step) for step in steps if step.errno], [])
        count = syncs.counts().ended - before
        self.expect("syncs of two fsyncs", count, at_least(2))
        self.usual("syncs of two fsyncs", count, 2)

    def begins(self, file: Path) -> set[int]:
        """Distinct byte values in the first page of a file."""
        with file.open("rb") as opened:
            return set(opened.read(PAGE))

    def test_share_off(self) -> None:
        """With share=off, too, data that a guest has synced are in the file."""
        private = replace(PMEM_OFF.at(2, SMALL), share=False)
        try:
            guest = self.machine(GOOD, private)
        except (StartError, RefusedError) as error:
            # A restored guest gets its DIMMs by device_add.
            if isinstance(error, StartError) and not error.refused:
                raise
            # The control: nothing else is refused.
            self.machine(GOOD, replace(private, share=True))
            self.known_issue("qemu-nvdimm-share-off", shows=False, found="QEMU refuses it")
            return
        for nvdimm in (GOOD, private):
            disk = self.disk(guest, nvdimm.slot)
            self.stored(guest, disk, 0xA5, guest.vm.syncs(nvdimm.slot))
        self.expect("bytes of the control", self.begins(guest.file(GOOD.slot)), {0xA5})
        first_bytes = self.begins(guest.file(private.slot))
        blocks = guest.file(private.slot).stat().st_blocks
        self.known_issue(
            "qemu-nvdimm-share-off",
            shows=first_bytes != {0xA5},
            found=f"two fsyncs succeeded, two fdatasyncs were made, the file has {blocks} blocks",
        )

    def test_memfd(self) -> None:
        """Data that a guest has synced are in a file that another QEMU can open."""
        guest, volatile = self.machine(GOOD), PMEM_OFF.at(2, SMALL)
        backend = {"qom-type": "memory-backend-memfd", "id": "mem2", "size": volatile.file_bytes}
        guest.qmp.execute("object-add", **backend)
        fds = Path(f"/proc/{guest.process.pid}/fd")
        files = [fd for fd in fds.iterdir() if "memory-backend-memfd" in str(fd.readlink())]
        if len(files) != 1:
            raise HostError(f"QEMU has {len(files)} files for one memory-backend-memfd")
        # QEMU has mapped it already; only msync and pmem_persist would need to know the address.
        syncs = self.watcher.watch(files[0])
        guest.qmp.execute("device_add", **volatile.frontend())
        self.stored(guest, self.disk(guest, volatile.slot), 0xA5, syncs)
        fdatasyncs = syncs.counts(Operation.FDATASYNC).ended
        self.check("fdatasyncs of all syncs", fdatasyncs, syncs.counts().ended)
        self.check("bytes of the file", self.begins(files[0]), {0xA5})
        links = files[0].stat().st_nlink
        self.known_issue(
            "qemu-nvdimm-on-volatile-file",
            shows=not links,
            found=f"two fsyncs succeeded, but their file has {links} links",
        )

    def test_file_used_twice(self) -> None:
        """Data that a guest has synced to one DIMM are not overwritten through another."""
        (first,) = self.keep(PMEM_OFF.at(2, SMALL)).nvdimms()
        second = first.at(3)
        guest = self.machine(GOOD, first, second)
        good, *disks = (self.disk(guest, nvdimm.slot) for nvdimm in (GOOD, first, second))
        if guest.vm.syncs(2) is not guest.vm.syncs(3):
            raise HostError("the shim counts two DIMMs on one file as two files")
        self.stored(guest, good, 0x33, guest.vm.syncs(GOOD.slot))
        for disk, byte in zip(disks, (0xA5, 0x5A), strict=True):
            self.stored(guest, disk, byte, guest.vm.syncs(2))
        guest.succeed("echo 3 > /proc/sys/vm/drop_caches")
        read = f"read=0:{PAGE}"
        (control,) = persist(guest, good, read)
        self.expect("byte of the control", control.byte, 0x33)
        (read_back,) = persist(guest, disks[0], read)
        self.known_issue(
            "qemu-nvdimm-file-used-twice",
            shows=read_back.byte != 0xA5,
            found=f"0xa5 was synced to the first DIMM, 0x5a to the second; the first has "
            f"{read_back.byte:#x}",
        )

    def test_pmem_override(self) -> None:
        """With pmem-override on a file that is not DAX, a flush asks the host to sync it."""
        override = OVERRIDE.at(2, SMALL)
        guest = self.machine(GOOD, override)
        with guest.file(override.slot).open("r+b") as file:
            try:
                mmap.mmap(file.fileno(), mmap.PAGESIZE, flags=MAP_SHARED_VALIDATE | MAP_SYNC)
            except OSError:
                pass
            else:
                raise CapabilityError(f"{self.settings.scratch_dir} is persistent memory")
        counts = {}
        for nvdimm in (GOOD, override):
            disk, syncs = self.disk(guest, nvdimm.slot), guest.vm.syncs(nvdimm.slot)
            hcalls = count_hcalls(guest)
            self.stored(guest, disk, 0xA5, syncs)
            # Both DIMMs are flushed by hcall.
            self.expect("hcalls of two fsyncs", count_hcalls(guest) - hcalls, at_least(4))
            ended = {o.name.lower(): syncs.counts(o).ended for o in FLUSHES}
            counts[nvdimm] = {name: count for name, count in ended.items() if count}
        self.measure("calls of two fsyncs", list(counts.values()))
        self.expect("syncs of two fsyncs on pmem=off", sum(counts[GOOD].values()), at_least(2))
        self.usual("calls of two fsyncs on pmem=off", counts[GOOD], {"fdatasync": 2})
        self.known_issue(
            "qemu-pmem-override-syncs-nothing",
            shows=set(counts[override]) == {"pmem_persist"},
            found=f"two fsyncs succeeded, but QEMU called only {counts[override]}",
        )

    def expect_store_to_end(self, guest: Guest, disk: str, cause: str, *steps: str) -> None:
        """Make stores that the host cannot back; they must fail, and QEMU must keep running."""
        # A write(2) on the host would fail with EIO or ENOSPC; a store has no return value.
        try:
            results = persist(guest, disk, *steps)
        except GuestLostError:
            status = guest.process.wait(10)
            if status is None:
                raise ContractError("the guest is lost, but QEMU still runs") from None
            guest.kill()
            if status != -signal.SIGBUS:
                raise
            outcome = f"{cause}, and QEMU ended, {describe_status(status)}"
        else:
            in_words = ", ".join(map(str, results))
            if not any(step.errno for step in results):
                raise ContractError(f"{cause}, and the guest got success: {in_words}")
            status, outcome = 0, f"{cause}, and the guest got {in_words}"
        self.known_issue("qemu-nvdimm-sigbus", shows=status != 0, found=outcome)

    def test_truncated(self) -> None:
        """After its DIMM's file is truncated, a guest keeps running, and its stores fail."""
        guest = self.machine(GOOD)
        disk, syncs = self.disk(guest, GOOD.slot), guest.vm.syncs(GOOD.slot)
        self.stored(guest, disk, 0xA5, syncs)
        os.truncate(guest.file(GOOD.slot), PAGE)
        self.expect("bytes of the rest", self.begins(guest.file(GOOD.slot)), {0xA5})
        # The remaining part can still be synced.
        self.stored(guest, disk, 0x5A, syncs)
        steps = f"write={SMALL // 2}:{PAGE}:1", "fsync"
        self.expect_store_to_end(guest, disk, "the file was truncated", *steps)
        self.check("bytes of the rest", self.begins(guest.file(GOOD.slot)), {0x5A})

    def test_full_file_system(self) -> None:
        """When the host's file system is full, a guest keeps running, and its stores fail.

        Data that were synced before stay in the file.
        """
        if os.geteuid() != 0:
            raise CapabilityError("only root can mount a small file system", hint="run as root")
        place = Path(tempfile.mkdtemp(prefix="paprscm-", dir=self.settings.scratch_dir))
        self.leave.callback(place.rmdir)
        mounting = ["mount", "-t", "tmpfs", "-o", "size=8m", "paprscm", str(place)]
        try:
            run(mounting, timeout_s=20)
        except HostError as error:
            raise CapabilityError(f"this root cannot mount: {error}") from error
        self.leave.callback(run, ["umount", place], timeout_s=20)
        file = place / "dimm"
        file.touch()
        os.truncate(file, GOOD.file_bytes)
        dimm = replace(PMEM_OFF.at(2, SMALL), file=file)
        guest = self.machine(dimm)
        disk = self.disk(guest, dimm.slot)
        self.stored(guest, disk, 0xA5, guest.vm.syncs(dimm.slot))
        size = 16 * MIB
        if size <= os.statvfs(place).f_bavail * os.statvfs(place).f_frsize:
            raise HostError(f"{place} has room for {size} bytes")
        steps = f"write={PAGE}:{size}:1", "fsync"
        self.expect_store_to_end(guest, disk, "the host's file system is full", *steps)
        self.check("bytes of the file", self.begins(file), {0xA5})
