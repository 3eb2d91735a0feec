# SPDX-License-Identifier: GPL-2.0-or-later
"""Namespaces: each mode, several on one DIMM, after a reboot, and partitioned.

The disk of a file system decides whether its files can be DAX: drivers/nvdimm/pmem.c,
pmem_attach_disk (BLK_FEAT_DAX only with page structures), drivers/nvdimm/btt.c, and
drivers/dax/super.c, fs_dax_get_by_bdev. The backend of the disk decides whether they get MAP_SYNC:
pmem_attach_disk again (set_dax_synchronous).
"""

import uuid
from dataclasses import replace
from typing import Any

from paprscm.checks import above, below
from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.map_sync.probe import map_sync
from paprscm.map_sync.verdict import MapResult, Verdict, judge_map_sync, on_dax_file
from paprscm.pmem.mounts import FsType, dax_mount, make_filesystem, mount, try_mount
from paprscm.pmem.namespaces import (
    BlockDevice,
    Namespace,
    NamespaceMap,
    NamespaceMode,
    create_fsdax,
    create_namespace,
    find_namespaces,
    partition,
)
from paprscm.pmem.regions import Region, read_page_size, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, PMEM_ON
from paprscm.vm.machine import GIB, MIB, Machine, Nvdimm


class NamespaceTest(PaprScmTest):
    """
    Base of the namespace tests.

    :avocado: disable
    """

    def probe(
        self, guest: Guest, what: str, path: str, fstype: FsType, expected: Verdict, **options: Any
    ) -> None:
        """Probe a file, check its type of file system, and compare the verdict."""
        report = map_sync(guest, path, **options)
        self.measure(what, report.line)
        self.check_map_sync(what, report, expected, fstype=fstype)


class Partitions(NamespaceTest):
    """
    Partitions of the disk of a DIMM.

    :avocado: tags=map_sync
    """

    def judge(self, nvdimm: Nvdimm) -> None:
        """Make four partitions that differ in start and size, and judge each."""
        guest = self.boot(Machine(nvdimms=(nvdimm.holding("fsdax"),)))
        disk = create_fsdax(guest, wait_for_region(guest, nvdimm.slot))
        page = read_page_size(guest)
        kinds = (
            ("begins and ends at a page", 0, 0, True),
            ("begins a sector later", 512, 0, False),
            ("is a sector larger", 0, 512, False),
            ("begins 4 KiB later", 4096, 0, page == 4096),
        )
        ranges = [
            ((1 + 64 * index) * MIB + later, 32 * MIB + larger)
            for index, (_what, later, larger, _dax) in enumerate(kinds)
        ]
        for (what, _later, _larger, dax), path in zip(
            kinds, partition(guest, disk, ranges), strict=True
        ):
            make_filesystem(guest, path, "ext4", page)
            always = try_mount(guest, path, "ext4", "/mnt")
            name = path.removeprefix("/dev/")
            if dax:
                self.check(f"mount of the partition that {what}", always.errno_name, None)
            else:
                self.usual(f"mount of the partition that {what}", always.errno_name, "EINVAL")
                messages = (
                    f"{name}: error: unaligned partition for dax",
                    f"EXT4-fs ({name}): DAX unsupported by block device.",
                )
                self.usual(f"log of the partition that {what}", always.messages, messages)
                if always.errno_name is not None:
                    mount(guest, path, "ext4", "/mnt", options="")
            expected = on_dax_file(nvdimm) if dax else Verdict.NOT_DAX
            self.probe(guest, what, "/mnt/file", "ext4", expected)
            guest.succeed("umount /mnt")

    def test_pmem_on(self) -> None:
        """On pmem=on, a page-aligned partition grants MAP_SYNC; an unaligned one does not have DAX.

        drivers/dax/super.c, fs_dax_get_by_bdev; so far ext4 refuses dax=always there with EINVAL.
        """
        self.judge(PMEM_ON)

    def test_pmem_off(self) -> None:
        """On pmem=off, a page-aligned partition has only DAX; an unaligned one not even that."""
        self.judge(PMEM_OFF)


class Modes(NamespaceTest):
    """
    One namespace of each mode, on one DIMM.

    :avocado: tags=map_sync
    """

    def judge(self, nvdimm: Nvdimm, *, sector: bool) -> None:
        """Make a namespace of each mode, and judge it."""
        guest = self.boot(Machine(nvdimms=(nvdimm,)))
        region = wait_for_region(guest, nvdimm.slot)
        page = read_page_size(guest)
        kinds: list[tuple[NamespaceMode, NamespaceMap | None]] = [
            ("fsdax", "dev"),
            ("fsdax", "mem"),
            ("raw", None),
            *([("sector", None)] if sector else []),  # type: ignore[list-item]
            ("devdax", "dev"),
        ]
        namespaces = []
        for mode, location in kinds:
            namespace = create_namespace(
                guest, region, mode=mode, map=location, size_bytes=64 * MIB
            )
            namespaces.append(namespace)
            if mode == "devdax":
                self.devdax(guest, namespace, nvdimm)
            else:
                self.disk(guest, namespace, page, nvdimm)
        self.check("the region's namespaces", find_namespaces(guest, region), tuple(namespaces))
        self.check(
            "the number of uuids", len({namespace.uuid for namespace in namespaces}), len(kinds)
        )

    def disk(self, guest: Guest, namespace: Namespace, page: int, nvdimm: Nvdimm) -> None:
        """Judge a block device: its properties, and an ext4 on it."""
        disk, what = namespace.disk, f"{namespace.mode} {namespace.map or ''}".strip()
        is_dax = namespace.mode == "fsdax"
        self.check(f"{what}: queue/dax", disk.dax, str(int(is_dax)))
        # ndctl chooses the sector size.
        sectors = 4096 if namespace.mode == "sector" else 512
        self.usual(f"{what}: sector", disk.sector_bytes, sectors)
        # A BTT is a separate disk, without a write cache.
        if namespace.mode == "sector":
            self.usual(f"{what}: write cache", disk.write_cache, "write through")
        else:
            self.check(f"{what}: write cache", disk.write_cache, "write back")
        # Page structures take 64 bytes for each page, and are on the DIMM only with map=dev.
        whole = namespace.map != "dev" and namespace.mode != "sector"
        spare = 64 * MIB - disk.size_bytes
        self.check(f"{what}: all but the info block", spare <= 2 * MIB and whole, whole)
        make_filesystem(guest, disk, "ext4", page)
        always = try_mount(guest, disk, "ext4", "/mnt")
        if is_dax:
            self.check(f"{what}: mount", always.errno_name, None)
        else:
            self.usual(f"{what}: mount", always.errno_name, "EINVAL")
            messages = (f"EXT4-fs ({disk.name}): DAX unsupported by block device.",)
            self.usual(f"{what}: the log", always.messages, messages)
            if always.errno_name is not None:
                mount(guest, disk, "ext4", "/mnt", options="")
        expected = on_dax_file(nvdimm) if is_dax else Verdict.NOT_DAX
        self.probe(guest, what, "/mnt/file", "ext4", expected)
        guest.succeed("umount /mnt")
        # A mapping of the block device itself always uses the page cache (block/fops.c).
        report = map_sync(guest, disk.path, truncate=False, length=page)
        self.measure(f"{disk.path}, {what}", report.line)
        kind = report.file.type if report.file else "absent"
        outcome = (kind, judge_map_sync(report).verdict, report.mapping.errno_name)
        self.check(f"{disk.path}, {what}", outcome, ("block", Verdict.NOT_DAX, "EOPNOTSUPP"))

    def devdax(self, guest: Guest, namespace: Namespace, nvdimm: Nvdimm) -> None:
        """Judge a character device, which grants MAP_SYNC on pmem=on.

        So far it does on pmem=off, too; tests/map_sync/test_devdax.py judges that
        (known_issues/linux-devdax-grants-map-sync.md).
        """
        report = map_sync(guest, namespace.path, truncate=False, length=2 * MIB)
        self.measure("devdax", report.line)
        flags = report.mapping.vm_flags or frozenset()
        kind = report.file.type if report.file else "absent"
        self.check("the type of the devdax device", kind, "character")
        granted = (report.mapping.result, "sf" in flags) == (MapResult.MAPPED, True)
        refused = (report.mapping.result, report.mapping.errno_name)
        if not granted and (nvdimm.pmem or refused != (MapResult.REFUSED, "EOPNOTSUPP")):
            self.check("MAP_SYNC on devdax", str(report.mapping), "granted, or EOPNOTSUPP")

    def test_pmem_on(self) -> None:
        """On pmem=on, fsdax and devdax grant MAP_SYNC; raw and sector do not have DAX."""
        self.judge(PMEM_ON, sector=True)

    def test_pmem_off(self) -> None:
        """On pmem=off, only fsdax has DAX, and MAP_SYNC is refused there.

        Sector mode is left out: its 1038 flushes take ten seconds (drivers/nvdimm/claim.c,
        nsio_rw_bytes, flushes at each write), and its result does not depend on the backend.
        """
        self.judge(PMEM_OFF, sector=False)


class Several(NamespaceTest):
    """
    Two fsdax namespaces on one DIMM.

    :avocado: tags=map_sync
    """

    def judge(self, nvdimm: Nvdimm) -> None:
        """Mount an XFS and an ext4 concurrently, and judge both."""
        guest = self.boot(Machine(nvdimms=(nvdimm,)))
        region = wait_for_region(guest, nvdimm.slot)
        page = read_page_size(guest)
        kinds: tuple[tuple[FsType, int | None], ...] = (("xfs", 512 * MIB), ("ext4", None))
        disks: list[BlockDevice] = []
        for fstype, size in kinds:
            namespace = create_namespace(guest, region, mode="fsdax", size_bytes=size)
            disks.append(namespace.disk)
            make_filesystem(guest, namespace.disk, fstype, page)
            mount(guest, namespace.disk, fstype, f"/mnt/{fstype}")
        self.check("the number of disks", len({disk.path for disk in disks}), 2)
        together = sum(disk.size_bytes for disk in disks)
        self.check("bytes of both disks", together, above(region.size_bytes * 0.98))
        self.check("bytes of both disks", together, below(region.size_bytes))
        for fstype, _size in kinds:
            expected = on_dax_file(nvdimm)
            self.probe(guest, fstype, f"/mnt/{fstype}/file", fstype, expected, pages=4)
        # Stores to the second file system must not overwrite the first.
        sums = guest.succeed(
            "set -e; sync; cd /mnt; cksum < xfs/file; umount /mnt/ext4; cksum < xfs/file; "
            f"umount /mnt/xfs; mount -o dax=always {disks[0].path} /mnt/xfs; cksum < xfs/file"
        ).splitlines()
        self.check("the checksums of one file", len(set(sums)), 1)

    def test_pmem_on(self) -> None:
        """Two file systems on two namespaces of one DIMM with pmem=on both grant MAP_SYNC."""
        self.judge(PMEM_ON.at(0, GIB))

    def test_pmem_off(self) -> None:
        """Two file systems on two namespaces of one DIMM with pmem=off both refuse MAP_SYNC."""
        self.judge(PMEM_OFF.at(0, GIB))


class Kept(NamespaceTest):
    """
    A namespace and its file system in the next boot, on the same file with another backend.

    :avocado: tags=map_sync
    """

    def judge(self, first: Nvdimm, second: Nvdimm, fstype: FsType) -> None:
        """Make a namespace in one boot, and compare it with the namespace in the next boot."""
        file = self.keep(first).path(first.slot)
        # The uuid identifies the device for the guest, in any slot and with any backend.
        first, second = (replace(nvdimm, file=file, uuid=UUID) for nvdimm in (first, second))
        before, region, namespace, label = self.first_boot(first, fstype)
        # The label area is at the end of the file; a label has its namespace's uuid in binary
        # (drivers/nvdimm/label.h, struct nvdimm_efi_label).
        self.check("the uuid in the labels", label.bytes in labels(first), True)

        guest = self.boot(Machine(nvdimms=(second,)))
        again = dax_mount(guest, second.slot, fstype, "/mnt", reuse=True)
        for key in ("mode", "map", "uuid"):
            self.check(key, getattr(again.namespace, key), getattr(namespace, key))
        self.check("size", again.device.size_bytes, namespace.disk.size_bytes)
        self.check("uuid in the label", label_uuid(guest, again.namespace), label)
        for now, dimm in ((region, first), (again.region, second)):
            self.check(f"deep_flush, {dimm.pmem=}", now.deep_flush, "0" if dimm.pmem else "1")
        self.check("the file's checksum", guest.succeed("cksum < /mnt/kept"), before)
        expected = on_dax_file(second)
        self.probe(guest, "second boot", "/mnt/kept", fstype, expected, truncate=False)

    def first_boot(
        self, nvdimm: Nvdimm, fstype: FsType
    ) -> tuple[str, Region, Namespace, uuid.UUID]:
        """Make a file; return its checksum, the region, the namespace and the label's uuid."""
        guest = self.boot(Machine(nvdimms=(nvdimm,)))
        mounted = dax_mount(guest, nvdimm.slot, fstype, "/mnt")
        self.probe(guest, "first boot", "/mnt/kept", fstype, on_dax_file(nvdimm), pages=4)
        checksum = guest.succeed("cksum < /mnt/kept && umount /mnt")
        label = label_uuid(guest, mounted.namespace)
        guest.kill()
        return checksum, mounted.region, mounted.namespace, label

    def test_other_uuid(self) -> None:
        """A namespace belongs to its DIMM's uuid: with another uuid it is hidden, but not lost.

        papr_scm makes the region's cookie from the uuid (papr_scm_nvdimm_init). Each label has the
        cookie, and drivers/nvdimm/namespace_devs.c accepts only labels with the region's cookie.
        """
        (other,) = self.keep(PMEM_OFF).nvdimms()
        own = replace(other, uuid=UUID)
        guest = self.boot(Machine(nvdimms=(own,)))
        namespace = create_namespace(guest, wait_for_region(guest, 0), mode="fsdax")
        guest.kill()
        before = labels(own)
        for nvdimm, expected in ((other, ()), (own, (namespace,))):
            guest = self.boot(Machine(nvdimms=(nvdimm,)))
            namespaces = find_namespaces(guest, wait_for_region(guest, 0))
            self.check(f"with {nvdimm.guid}, the namespace", namespaces, expected)
            guest.kill()
        self.check("the label area", labels(own) == before, True)

    def test_xfs_on_then_off(self) -> None:
        """An XFS made on pmem=on survives a boot with pmem=off, and refuses MAP_SYNC there."""
        self.judge(PMEM_ON, PMEM_OFF, "xfs")

    def test_ext4_off_then_on(self) -> None:
        """An ext4 made on pmem=off survives a boot with pmem=on, and grants MAP_SYNC there."""
        self.judge(PMEM_OFF.at(1), PMEM_ON.at(4), "ext4")


UUID = "3b0c7f0e-9d3b-4a53-8f2e-6a1d5c0f7e21"


def labels(nvdimm: Nvdimm) -> bytes:
    """Content of the label area in the backing file."""
    with nvdimm.file.open("rb") as content:  # type: ignore[union-attr]
        content.seek(nvdimm.size_bytes)
        return content.read()


def label_uuid(guest: Guest, namespace: Namespace) -> uuid.UUID:
    """The uuid in a namespace's label; ndctl prints the uuid of the pfn device instead."""
    return uuid.UUID(guest.succeed(f"cat /sys/bus/nd/devices/{namespace.name}/uuid"))


class Inherited(NamespaceTest):
    """
    Namespaces that replace others.

    :avocado: tags=map_sync
    """

    def test_devdax_then_fsdax(self) -> None:
        """On pmem=off, an fsdax namespace refuses MAP_SYNC, also if it was devdax before.

        drivers/dax/super.c, dax_dev_get: a new dax_device must not inherit the flags of a former
        one whose memory it reuses. The reuse depends on chance, so there are several tries on one
        CPU.
        """
        guest = self.boot(Machine(nvdimms=(PMEM_OFF,)))
        region = wait_for_region(guest, 0)
        page = read_page_size(guest)
        verdicts: list[Verdict] = []
        namespace = create_namespace(guest, region, mode="devdax", size_bytes=64 * MIB)
        for _try in range(6):
            turn(guest, namespace.name, "fsdax")
            (namespace,) = find_namespaces(guest, region)
            make_filesystem(guest, namespace.disk, "ext4", page)
            mount(guest, namespace.disk, "ext4", "/mnt")
            report = map_sync(guest, "/mnt/file")
            verdicts.append(judge_map_sync(report).verdict)
            guest.succeed("umount /mnt")
            if verdicts[-1] is not Verdict.REFUSED:
                break
            turn(guest, namespace.name, "devdax")
            (namespace,) = find_namespaces(guest, region)
        self.measure("verdicts", [verdict.value for verdict in verdicts])
        self.known_issue(
            "linux-dax-device-inherits-flags",
            shows=verdicts[-1] is Verdict.ACCEPTED,
            found=f"fsdax after devdax on pmem=off, try {len(verdicts)}: {verdicts[-1].value}",
        )
        if verdicts[-1] not in (Verdict.ACCEPTED, Verdict.REFUSED):
            raise ContractError(str(judge_map_sync(report)))


def turn(guest: Guest, namespace: str, mode: NamespaceMode) -> None:
    """Change the mode of a namespace by `ndctl create-namespace -e`."""
    guest.succeed(f"taskset 1 ndctl create-namespace -f -e {namespace} -m {mode}")
