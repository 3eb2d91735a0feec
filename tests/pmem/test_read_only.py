# SPDX-License-Identifier: GPL-2.0-or-later
"""A DIMM that cannot persist writes is read-only for region, disk, mount and mmap().

QEMU sets the "unarmed" bit of H_SCM_HEALTH for unarmed=on (hw/ppc/spapr_nvdimm.c, h_scm_health),
and demands it for a backend with readonly=on. papr_scm makes it NDD_UNARMED (papr_scm.c,
papr_scm_nvdimm_init), with which the region becomes read-only (drivers/nvdimm/region_devs.c,
nd_region_create) and so does each disk on it (drivers/nvdimm/bus.c, nvdimm_check_and_set_ro, called
by drivers/nvdimm/pmem.c, pmem_attach_disk).

The namespaces are made in a boot before, on the same files with writable DIMMs. On a read-only
backend they could not be made: a label that is written ends QEMU 7 (known_issues/
qemu-label-write-to-read-only-backend.md). Nothing here writes one. They are made with map=mem: with
map=dev the kernel keeps its page structures on the DIMM, and may write to it anyway
(known_issues/linux-page-structures-on-read-only-dimm.md).
"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from paprscm.guest.guest import Guest
from paprscm.map_sync.probe import map_sync
from paprscm.map_sync.verdict import MapSyncReport, on_dax_file
from paprscm.pmem.mounts import FsType, dax_mount, make_filesystem, mount, try_mount
from paprscm.pmem.namespaces import (
    Namespace,
    create_fsdax,
    create_namespace,
    find_namespaces,
)
from paprscm.pmem.regions import read_page_size, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, PMEM_ON
from paprscm.vm.machine import Machine, Nvdimm

_CHUNK = 1 << 16
# drivers/nvdimm/pfn.h: the info block has 4 KiB, behind as many.
_INFO_BLOCK_END = 8192


def digest(file: Path, begin: int = 0) -> str:
    """Checksum of a sparse file; holes and written zeros are the same.

    Args:
        file: the file.
        begin: where to begin in it, a multiple of 64 KiB.
    """
    found, size = hashlib.sha256(), file.stat().st_size
    with file.open("rb", buffering=0) as content:
        at = begin
        while at < size:
            try:
                at = os.lseek(content.fileno(), at, os.SEEK_DATA) // _CHUNK * _CHUNK
            except OSError:
                break
            data = os.pread(content.fileno(), _CHUNK, at)
            if data.strip(b"\0"):
                found.update(at.to_bytes(8, "big") + data)
            at += _CHUNK
    return found.hexdigest()


def fate(report: MapSyncReport) -> str:
    """The result of a mapping for which judge_map_sync() has no verdict."""
    mapping = report.mapping
    flags = mapping.vm_flags or frozenset()
    return f"{mapping.result} {mapping.errno_name or ('sf' if 'sf' in flags else 'no sf')}"


class ReadOnly(PaprScmTest):
    """
    Two DIMMs with unarmed=on, one on pmem=on and one on pmem=off.

    :avocado: tags=map_sync
    """

    dimms = (PMEM_ON.at(0), PMEM_OFF.at(1))
    fstypes: tuple[FsType, ...] = ("xfs", "ext4")

    def setUp(self) -> None:
        """Make the backing files."""
        super().setUp()
        self.kept = self.keep(*self.dimms)

    @property
    def files(self) -> list[Path]:
        """The backing files of the DIMMs."""
        return [self.kept.path(nvdimm.slot) for nvdimm in self.dimms]

    def on_files(self, *, unarmed: bool = False, read_only: bool = False) -> tuple[Nvdimm, ...]:
        """The DIMMs on their files."""
        return tuple(
            replace(nvdimm, unarmed=unarmed, read_only=read_only) for nvdimm in self.kept.nvdimms()
        )

    def prepare(self) -> tuple[list[Namespace], list[str]]:
        """Boot with writable DIMMs; return the namespaces, and the checksum of a file on each."""
        guest = self.boot(Machine(nvdimms=self.on_files()))
        made = []
        for nvdimm, fstype in zip(self.dimms, self.fstypes, strict=True):
            region = wait_for_region(guest, nvdimm.slot)
            made.append(create_namespace(guest, region, mode="fsdax", map="mem"))
            make_filesystem(guest, made[-1].disk, fstype, read_page_size(guest))
            mount(guest, made[-1].disk, fstype, f"/mnt/{fstype}")
        sums = [
            guest.succeed(
                f"set -e; cd /mnt/{fstype}; dd if=/dev/urandom of=file bs=64k count=2 status=none; "
                f"cksum < file; cd /; umount /mnt/{fstype}"
            )
            for fstype in self.fstypes
        ]
        guest.kill()
        return made, sums

    def judge(self, guest: Guest, made: list[Namespace], sums: list[str]) -> None:
        """Check everything that must be read-only, and everything that must still work."""
        log = guest.succeed("dmesg -t").splitlines()
        for nvdimm, fstype, before, checksum in zip(
            self.dimms, self.fstypes, made, sums, strict=True
        ):
            what = f"{fstype}, pmem={'on' if nvdimm.pmem else 'off'}"
            region = wait_for_region(guest, nvdimm.slot)
            self.check(f"{what}: region read_only", region.read_only, True)
            flags = region.dimm.papr_flags if region.dimm else None
            self.check(f"{what}: not_armed in papr/flags", "not_armed" in (flags or ()), True)
            self.usual(f"{what}: papr/flags", flags, {"not_armed"})
            (found,) = find_namespaces(guest, region)
            self.check(f"{what}: uuid", found.uuid, before.uuid)
            disk = found.disk
            self.check(f"{what}: disk read-only", disk.read_only, True)
            said = f"{region.name} read-only, marking {disk.name} read-only"
            self.usual(f"{what}: '{said}'", any(line.endswith(said) for line in log), True)
            # A disk that is not read-only must not be written to: the rest depends on its content.
            self.checkpoint()
            # Some versions of dd print their statistics after the reason.
            dd = "dd if=/dev/zero bs=4096 count=1 oflag=direct status=none"
            result = guest.run(f"{dd} of={disk.path}")
            self.check(f"{what}: a write to the disk succeeds", result.status == 0, False)
            reason = result.stderr.strip().rpartition(": ")[2]
            self.usual(f"{what}: a write to the disk", reason, "Operation not permitted")

            # fs/super.c, setup_bdev_super: EACCES; mount programs then try again with ro.
            for how in ("rw", "remount,rw"):
                answer = try_mount(guest, disk, fstype, "/mnt", options=f"{how},dax=always")
                self.check(f"{what}: mount with {how} succeeds", answer.errno_name is None, False)
                self.usual(f"{what}: mount with {how}", answer.errno_name, "EACCES")
            guest.succeed("umount /mnt")
            mounted = mount(guest, disk, fstype, "/mnt", options="ro,dax=always")
            self.check(f"{what}: mounted", mounted.options[0], "ro")
            self.check(f"{what}: checksum", guest.succeed("cksum < /mnt/file"), checksum)
            self.mappings(guest, nvdimm, what)
            guest.succeed("umount /mnt")

    def mappings(self, guest: Guest, nvdimm: Nvdimm, what: str) -> None:
        """Check mmap(): nothing can be stored, and the backend decides about MAP_SYNC."""
        path = "/mnt/file"
        write = map_sync(guest, path, truncate=False)
        self.check(f"{what}: open read-write", fate(write), "error EROFS")
        self.check(f"{what}: where that failed", write.mapping.stage, "open")
        store = map_sync(guest, path, truncate=False, read_only=True)
        # Before MAP_SYNC is looked at, or after: the file is open for reading only.
        self.check(f"{what}: a shared mapping to store into", fate(store), "refused EACCES")
        load = map_sync(guest, path, truncate=False, read_only=True, prot="r")
        self.measure(what, [report.line for report in (write, store, load)])
        dax = load.file.dax if load.file else None
        self.check(f"{what}: DAX", dax, True)
        wanted = "mapped sf" if nvdimm.pmem else "refused EOPNOTSUPP"
        self.check(f"{what}: a MAP_SYNC mapping to load from", fate(load), wanted)
        control = load.control.result if load.control else None
        self.check(f"{what}: the same without MAP_SYNC", control, "mapped")

    def unchanged(self, before: list[str]) -> None:
        """Check that the files have the same content as before."""
        for file, nvdimm, wanted in zip(self.files, self.dimms, before, strict=True):
            self.check(f"the bytes behind slot {nvdimm.slot}", digest(file), wanted)

    def test_unarmed(self) -> None:
        """With unarmed=on, region, disk and mount are read-only, and mmap() cannot store.

        The region's flag is the only reason: when it is cleared by hand (regionN/read_only), the
        disk can be written, and the backend decides about MAP_SYNC.
        """
        made, sums = self.prepare()
        before = [digest(file) for file in self.files]
        guest = self.boot(Machine(nvdimms=self.on_files(unarmed=True)))
        self.judge(guest, made, sums)
        self.unchanged(before)
        self.checkpoint()
        for nvdimm, fstype in zip(self.dimms, self.fstypes, strict=True):
            region = wait_for_region(guest, nvdimm.slot)
            guest.succeed(f"echo 0 > {region.device}/read_only")
            dax_mount(guest, nvdimm.slot, fstype, "/mnt", reuse=True, options="rw,dax=always")
            report = map_sync(guest, "/mnt/file", truncate=False)
            what = f"{fstype}, read_only cleared"
            self.check_map_sync(what, report, on_dax_file(nvdimm), fstype=fstype)
            guest.succeed("umount /mnt")

    def test_read_only(self) -> None:
        """With readonly=on, all is as with unarmed=on, and the backing files do not change."""
        made, sums = self.prepare()
        before = [digest(file) for file in self.files]
        guest = self.boot(Machine(nvdimms=self.on_files(unarmed=True, read_only=True)))
        self.judge(guest, made, sums)
        guest.kill()
        self.unchanged(before)

    def test_page_structures(self) -> None:
        """The kernel does not store its page structures on a read-only DIMM.

        With map=dev, where a writable DIMM has them, between the namespace's info block and its
        data: drivers/nvdimm/pfn_devs.c, __nvdimm_setup_pfn. The data are not touched.
        """
        armed = self.on_files()[0]
        file = self.files[0]
        guest = self.boot(Machine(nvdimms=(armed,)))
        region = wait_for_region(guest, 0)
        disk = create_fsdax(guest, region)
        make_filesystem(guest, disk, "ext4", read_page_size(guest))
        places = f"{region.device}/resource", f"/sys/block/{disk.name}/device/resource"
        start, data = (int(line, 16) for line in guest.succeed("cat " + " ".join(places)).split())
        guest.kill()
        # In a boot like the one before, the structures may come out as they are there already.
        with file.open("r+b") as content:
            content.seek(_INFO_BLOCK_END)
            content.write(b"\xa5" * (data - start - _INFO_BLOCK_END))
        before = digest(file), digest(file, data - start)
        guest = self.boot(Machine(nvdimms=(replace(armed, unarmed=True),)))
        region = wait_for_region(guest, 0)
        self.check("region read_only", region.read_only, True)
        (found,) = find_namespaces(guest, region)
        self.check("map", (found.map, found.disk.read_only), ("dev", True))
        page = read_page_size(guest)
        guest.kill()
        self.check("the data", digest(file, data - start), before[1])
        self.checkpoint()
        shows = digest(file) != before[0]
        if not shows and page != 4096:
            # With larger pages the few structures are in memory, which proves nothing.
            return
        self.known_issue(
            "linux-page-structures-on-read-only-dimm",
            shows=shows,
            found="the kernel wrote to a DIMM with unarmed=on, outside the data of its namespace",
        )
