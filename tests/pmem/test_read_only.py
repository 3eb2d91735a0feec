# SPDX-License-Identifier: GPL-2.0-or-later
"""A DIMM that cannot persist what is written is read-only all the way up to mmap().

QEMU sets the "unarmed" bit of H_SCM_HEALTH for unarmed=on (hw/ppc/spapr_nvdimm.c, h_scm_health),
and demands it for a backend with readonly=on. papr_scm makes it NDD_UNARMED (papr_scm.c,
papr_scm_nvdimm_init), with which the region becomes read-only (drivers/nvdimm/region_devs.c,
nd_region_create) and so does each disk on it (drivers/nvdimm/bus.c, nvdimm_check_and_set_ro, called
by drivers/nvdimm/pmem.c, pmem_attach_disk).

The namespaces are made in a boot before, on the same files with writable DIMMs. On a read-only
backend they could not be made: a label that is written ends QEMU 7 (known_issues/
qemu-label-write-to-read-only-backend.md). Nothing here writes one. They are made with map=mem: with
map=dev the kernel keeps its page structures on the DIMM, and may write to it all the same
(known_issues/linux-page-structures-on-read-only-dimm.md).
"""

import hashlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from paprscm.guest.guest import Guest
from paprscm.map_sync.probe import map_sync
from paprscm.map_sync.verdict import MapSyncReport, Verdict, judge
from paprscm.pmem.mounts import FsType, dax_mount, make_filesystem, mount, try_mount
from paprscm.pmem.namespaces import (
    Namespace,
    create_fsdax,
    create_namespace,
    find_namespaces,
)
from paprscm.pmem.regions import page_size, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.machine import Machine, Nvdimm

_CHUNK = 1 << 16
# drivers/nvdimm/pfn.h: the info block has 4 KiB, behind as many.
_INFO_BLOCK_END = 8192


def digest(file: Path, begin: int = 0) -> str:
    """Of the bytes of a sparse file: holes and zeros that were written are the same.

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
    """How a mapping that judge() has no verdict for went."""
    mapping = report.mapping
    flags = mapping.vm_flags or frozenset()
    return f"{mapping.result} {mapping.errno_name or ('sf' if 'sf' in flags else 'no sf')}"


class ReadOnly(PaprScmTest):
    """
    DIMMs with unarmed=on, one with pmem=on and one with pmem=off behind it.

    :avocado: tags=map_sync
    """

    dimms = (Nvdimm(slot=0, pmem=True), Nvdimm(slot=1))
    fstypes: tuple[FsType, ...] = ("xfs", "ext4")

    def setUp(self) -> None:
        """Two backing files that outlive a guest."""
        super().setUp()
        folder = Path(
            self.leave.enter_context(
                tempfile.TemporaryDirectory(prefix="paprscm-ro-", dir=self.settings.scratch_dir)
            )
        )
        self.files = [folder / f"dimm{nvdimm.slot}" for nvdimm in self.dimms]
        for file, nvdimm in zip(self.files, self.dimms, strict=True):
            file.touch()
            os.truncate(file, nvdimm.file_bytes)
        self.wrong: list[str] = []

    def same(self, what: str, found: object, wanted: object) -> None:
        """Note that something is not as it should be."""
        if found != wanted:
            self.wrong.append(f"{what}: {found!r}, expected {wanted!r}")

    def on_files(self, **options: bool) -> tuple[Nvdimm, ...]:
        """The DIMMs on their files, and what else they are."""
        return tuple(
            replace(nvdimm, file=file, **options)  # type: ignore[arg-type]
            for nvdimm, file in zip(self.dimms, self.files, strict=True)
        )

    def prepare(self) -> tuple[list[Namespace], list[str]]:
        """A boot with writable DIMMs: the namespaces, and the checksums of a file on each."""
        guest = self.boot(Machine(nvdimms=self.on_files()))
        made = []
        for nvdimm, fstype in zip(self.dimms, self.fstypes, strict=True):
            region = wait_for_region(guest, nvdimm.slot, 10)
            made.append(create_namespace(guest, region, mode="fsdax", map="mem"))
            make_filesystem(guest, made[-1].disk, fstype, page_size(guest))
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
        """All that must be read-only, and what still must work."""
        log = guest.succeed("dmesg -t").splitlines()
        for nvdimm, fstype, before, checksum in zip(
            self.dimms, self.fstypes, made, sums, strict=True
        ):
            what = f"{fstype}, pmem={'on' if nvdimm.pmem else 'off'}"
            region = wait_for_region(guest, nvdimm.slot, 10)
            self.same(f"{what}: region read_only", region.read_only, True)
            flags = region.dimm.papr_flags if region.dimm else None
            self.same(f"{what}: not_armed in papr/flags", "not_armed" in (flags or ()), True)
            self.usual(f"{what}: papr/flags", flags, {"not_armed"})
            (found,) = find_namespaces(guest, region)
            self.same(f"{what}: uuid", found.uuid, before.uuid)
            disk = found.disk
            self.same(f"{what}: disk read-only", disk.read_only, True)
            said = f"{region.name} read-only, marking {disk.name} read-only"
            self.usual(f"{what}: '{said}'", any(line.endswith(said) for line in log), True)
            # What is not read-only must not be written to: it holds what the rest is about.
            self.done()
            # Some versions of dd print their statistics after the reason.
            dd = "dd if=/dev/zero bs=4096 count=1 oflag=direct status=none"
            told = guest.run(f"{dd} of={disk.path}")
            self.same(f"{what}: a write to the disk succeeds", told.status == 0, False)
            reason = told.stderr.strip().rpartition(": ")[2]
            self.usual(f"{what}: a write to the disk", reason, "Operation not permitted")

            # fs/super.c, setup_bdev_super: EACCES; mount programs then try again with ro.
            for how in ("rw", "remount,rw"):
                answer = try_mount(guest, disk, fstype, "/mnt", options=f"{how},dax=always")
                self.same(f"{what}: mount with {how} succeeds", answer.errno_name is None, False)
                self.usual(f"{what}: mount with {how}", answer.errno_name, "EACCES")
            guest.succeed("umount /mnt")
            mounted = mount(guest, disk, fstype, "/mnt", options="ro,dax=always")
            self.same(f"{what}: mounted", mounted.options[0], "ro")
            self.same(f"{what}: checksum", guest.succeed("cksum < /mnt/file"), checksum)
            self.mappings(guest, nvdimm, what)
            guest.succeed("umount /mnt")

    def mappings(self, guest: Guest, nvdimm: Nvdimm, what: str) -> None:
        """What mmap() says: nothing can be stored, and the backend decides on MAP_SYNC."""
        path = "/mnt/file"
        write = map_sync(guest, path, truncate=False)
        self.same(f"{what}: open read-write", fate(write), "error EROFS")
        self.same(f"{what}: where that failed", write.mapping.stage, "open")
        store = map_sync(guest, path, truncate=False, read_only=True)
        # Before MAP_SYNC is looked at, or after: the file is open for reading only.
        self.same(f"{what}: a shared mapping to store into", fate(store), "refused EACCES")
        load = map_sync(guest, path, truncate=False, read_only=True, prot="r")
        self.measure(what, [report.line for report in (write, store, load)])
        dax = load.file.dax if load.file else None
        self.same(f"{what}: DAX", dax, True)
        wanted = "mapped sf" if nvdimm.pmem else "refused EOPNOTSUPP"
        self.same(f"{what}: a MAP_SYNC mapping to load from", fate(load), wanted)
        control = load.control.result if load.control else None
        self.same(f"{what}: the same without MAP_SYNC", control, "mapped")

    def unchanged(self, before: list[str]) -> None:
        """The files hold what they held."""
        for file, nvdimm, wanted in zip(self.files, self.dimms, before, strict=True):
            self.same(f"the bytes behind slot {nvdimm.slot}", digest(file), wanted)

    def done(self) -> None:
        """FAIL with all that was noted."""
        if self.wrong:
            self.fail("\n  ".join(["", *self.wrong]))

    def test_unarmed(self) -> None:
        """With unarmed=on region, disk and mount are read-only, and nothing can be stored by mmap.

        The region's flag is the only reason: when it is cleared by hand (regionN/read_only), the
        disk can be written, and the backend decides on MAP_SYNC as ever.
        """
        made, sums = self.prepare()
        before = [digest(file) for file in self.files]
        guest = self.boot(Machine(nvdimms=self.on_files(unarmed=True)))
        self.judge(guest, made, sums)
        self.unchanged(before)
        self.done()
        for nvdimm, fstype in zip(self.dimms, self.fstypes, strict=True):
            region = wait_for_region(guest, nvdimm.slot, 10)
            guest.succeed(f"echo 0 > {region.device}/read_only")
            dax_mount(guest, nvdimm.slot, fstype, "/mnt", reuse=True, options="rw,dax=always")
            report = map_sync(guest, "/mnt/file", truncate=False)
            verdict = Verdict.ACCEPTED if nvdimm.pmem else Verdict.REFUSED
            self.same(f"{fstype}, read_only cleared", judge(report).verdict, verdict)
            guest.succeed("umount /mnt")
        self.done()

    def test_read_only(self) -> None:
        """With readonly=on all is as with unarmed=on, and the files are the same, byte for byte."""
        made, sums = self.prepare()
        before = [digest(file) for file in self.files]
        guest = self.boot(Machine(nvdimms=self.on_files(unarmed=True, read_only=True)))
        self.judge(guest, made, sums)
        guest.kill()
        self.unchanged(before)
        self.done()

    def test_page_structures(self) -> None:
        """The kernel does not keep its page structures on a DIMM that is read-only.

        With map=dev, where a writable DIMM has them, between the namespace's info block and its
        data: drivers/nvdimm/pfn_devs.c, __nvdimm_setup_pfn. The data are not touched.
        """
        armed = self.on_files()[0]
        file = self.files[0]
        guest = self.boot(Machine(nvdimms=(armed,)))
        region = wait_for_region(guest, 0, 10)
        disk = create_fsdax(guest, region)
        make_filesystem(guest, disk, "ext4", page_size(guest))
        places = f"{region.device}/resource", f"/sys/block/{disk.name}/device/resource"
        start, data = (int(line, 16) for line in guest.succeed("cat " + " ".join(places)).split())
        guest.kill()
        # In a boot like the one before, the structures may come out as they are there already.
        with file.open("r+b") as content:
            content.seek(_INFO_BLOCK_END)
            content.write(b"\xa5" * (data - start - _INFO_BLOCK_END))
        before = digest(file), digest(file, data - start)
        guest = self.boot(Machine(nvdimms=(replace(armed, unarmed=True),)))
        region = wait_for_region(guest, 0, 10)
        self.same("region read_only", region.read_only, True)
        (found,) = find_namespaces(guest, region)
        self.same("map", (found.map, found.disk.read_only), ("dev", True))
        page = page_size(guest)
        guest.kill()
        self.same("the data", digest(file, data - start), before[1])
        self.done()
        shows = digest(file) != before[0]
        if not shows and page != 4096:
            # With larger pages so few are needed that they are in memory: it says nothing.
            return
        self.known_issue(
            "linux-page-structures-on-read-only-dimm",
            shows=shows,
            found="the kernel wrote to a DIMM with unarmed=on, outside the data of its namespace",
        )
