# SPDX-License-Identifier: GPL-2.0-or-later
"""Namespaces of a region and their devices."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final, Literal

from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.pmem.dump import Dump, run_steps
from paprscm.pmem.regions import Region, parse_region, same_region

NamespaceMode = Literal["fsdax", "devdax", "raw", "sector"]
NamespaceMap = Literal["dev", "mem"]


def file_offset(guest: Guest, region: Region, device: CharacterDevice) -> int:
    """Offset of a devdax device in the DIMM's backing file, bytes.

    The device begins after the namespace's metadata; the offset follows from the physical addresses
    of device and region. The file begins with the region, and ends with the label area.
    """
    folders = f"/sys/bus/dax/devices/{device.name}", region.device
    begins = guest.succeed(" && ".join(f"cat {folder}/resource" for folder in folders))
    start, region_start = (int(line, 16) for line in begins.split("\n"))
    return start - region_start


def disk_offset(guest: Guest, region: Region, disk: BlockDevice) -> int:
    """Offset of a block device's data in the DIMM's backing file, bytes.

    That of a BTT is the offset of its namespace: its sectors are not in order.
    """
    folder = f"/sys/block/{disk.name}/device"
    begins = guest.succeed(
        f"cd -P {folder} && if [ -e resource ]; then cat resource; else "
        f"cat /sys/bus/nd/devices/$(cat namespace)/resource; fi && cat {region.device}/resource"
    )
    start, region_start = (int(line, 16) for line in begins.split("\n"))
    return start - region_start


def create_namespace(
    guest: Guest,
    region: Region,
    *,
    mode: NamespaceMode,
    map: NamespaceMap | None = None,  # noqa: A002 - ndctl's name
    size_bytes: int | None = None,
    align_bytes: int | None = None,
) -> Namespace:
    """Create a namespace, and verify that its device belongs to the region, in one round trip.

    A namespace of the whole region that the DIMM should hold (`Nvdimm.holds`) is created for the
    first guest only.

    Args:
        guest: the guest.
        region: the region.
        mode: "fsdax", "devdax", "raw" or "sector".
        map: location of the page structures of fsdax and devdax; None: "dev", on the DIMM itself.
        size_bytes: size with metadata, a multiple of the region's `align_bytes`; None: the free
            space of the region.
        align_bytes: alignment of fsdax and devdax; None: ndctl's default.

    Raises:
        ContractError: ndctl failed, or the namespace belongs to another region or has another mode.
    """
    slot, whole = region.slot, (map, size_bytes, align_bytes) == (None, None, None)
    present = whole and guest.dimms.take(slot, mode)
    should_keep = whole and guest.dimms.should_keep(slot, mode)
    values = namespace_settings(mode, map, size_bytes, align_bytes)
    steps = ["find", "present" if present else "namespace"]
    dump = run_steps(guest, f"{mode} on {region.name}", steps, values, slot=slot)
    now = same_region(region, parse_region(dump, slot))
    if present:
        return present_namespace(dump, now, mode)
    namespace = created_namespace(dump, now, mode, map)
    if should_keep:
        guest.dimms.keep(slot)
    return namespace


def create_fsdax(guest: Guest, region: Region) -> BlockDevice:
    """Create an fsdax namespace of the whole region, as create_namespace(); return its disk."""
    return create_namespace(guest, region, mode="fsdax").disk


def find_namespace(guest: Guest, slot: int, mode: NamespaceMode) -> Namespace:
    """Find a region's only namespace of a mode, in one round trip, and without ndctl.

    Args:
        guest: the guest.
        slot: slot of the DIMM.
        mode: "fsdax", "devdax", "raw" or "sector".

    Raises:
        RegionError: no region.
        ContractError: there is another number of namespaces of that mode.
    """
    title = f"{mode} on slot {slot}"
    dump = run_steps(guest, title, ["find", "present"], {"ns_mode": mode}, slot=slot)
    return present_namespace(dump, parse_region(dump, slot), mode)


def find_namespaces(guest: Guest, region: Region) -> tuple[Namespace, ...]:
    """The existing namespaces of a region, in the order of their numbers.

    Raises:
        ContractError: a device listed by ndctl does not belong to the region, or has another mode.
    """
    dump = run_steps(guest, f"ndctl on {region.name}", ["find", "namespaces"], slot=region.slot)
    return parse_namespaces(dump, same_region(region, parse_region(dump, region.slot)))


def partition(guest: Guest, disk: BlockDevice, ranges: Sequence[tuple[int, int]]) -> list[str]:
    """Partition a disk at arbitrary sectors; return the paths of the partitions.

    Args:
        guest: the guest.
        disk: the disk; its content is lost.
        ranges: start and size of each, bytes, multiples of 512; at most four.

    Raises:
        ContractError: partx failed, or the kernel reports other partitions.
    """
    sectors = [(start // 512, size // 512) for start, size in ranges]
    if [(512 * start, 512 * size) for start, size in sectors] != list(ranges) or len(ranges) > 4:
        raise ValueError(f"an MBR cannot hold {ranges}")
    # Boot flag, CHS values that mean "see LBA", type Linux, start and size
    # (block/partitions/msdos.c, include/linux/msdos_partition.h).
    chs = bytes.fromhex("feffff")
    table = b"".join(
        b"\0" + chs + b"\x83" + chs + struct.pack("<II", *sector_range) for sector_range in sectors
    )
    table = table.ljust(64, b"\0") + b"\x55\xaa"
    values = {"disk": disk.path, "table": table.hex()}
    dump = run_steps(guest, f"partitions of {disk.path}", ["partition"], values)
    names = [f"{disk.name}p{number}" for number in range(1, len(ranges) + 1)]
    expected: dict[str, str] = {}
    for name, (start, size) in zip(names, sectors, strict=True):
        expected |= {f"{name}/start": str(start), f"{name}/size": str(size)}
    if dump.texts != expected:
        raise ContractError(f"{disk.path} has the partitions {dump.texts}, expected {expected}")
    return [f"/dev/{name}" for name in names]


def namespace_settings(
    mode: NamespaceMode,
    map_: NamespaceMap | None,
    size_bytes: int | None,
    align_bytes: int | None,
) -> dict[str, str]:
    return {
        "ns_mode": mode,
        "ns_map": map_ or "",
        "ns_size": str(size_bytes or ""),
        "ns_align": str(align_bytes or ""),
    }


def created_namespace(
    dump: Dump, region: Region, mode: NamespaceMode, map_: NamespaceMap | None
) -> Namespace:
    """The created namespace; ContractError unless it is as requested."""
    namespaces = parse_namespaces(dump, region)
    if len(namespaces) != 1 or namespaces[0].mode != mode or map_ not in (None, namespaces[0].map):
        requested = f"{mode}, map {map_}" if map_ else mode
        raise ContractError(f"{region.name}: ndctl created {namespaces}, requested was {requested}")
    return namespaces[0]


PERSONALITIES: Final = {"fsdax": "pfn", "devdax": "dax", "sector": "btt", "raw": "namespace"}
"""Parent of the device in sysfs, for each mode of a namespace (drivers/nvdimm)."""


# drivers/nvdimm/pfn_devs.c, mode_show; ndctl's word.
_MAPS: Final = {"pmem": "dev", "ram": "mem"}


@dataclass(frozen=True, kw_only=True)
class BlockDevice:
    """The block device of a namespace.

    Attributes:
        name, path: "pmem0", "/dev/pmem0".
        region: name of its region, as verified in sysfs.
        size_bytes: usable size.
        sector_bytes: its logical block size.
        read_only: the kernel refuses writes.
        fua, dax, write_cache: from its queue folder in sysfs; None: no such file.
    """

    name: str
    path: str
    region: str
    size_bytes: int
    sector_bytes: int
    read_only: bool
    fua: str | None
    dax: str | None
    write_cache: str | None


@dataclass(frozen=True, kw_only=True)
class CharacterDevice:
    """The character device of a devdax namespace.

    Attributes:
        name, path: "dax0.0", "/dev/dax0.0".
        region: name of its region, as verified in sysfs.
        size_bytes: usable size.
        align_bytes: alignment of offset and length of a mapping.
    """

    name: str
    path: str
    region: str
    size_bytes: int
    align_bytes: int


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """One namespace of a region.

    Attributes:
        name: "namespace0.0".
        region: name of its region, as verified in sysfs.
        mode: "fsdax", "devdax", "raw" or "sector", as verified in sysfs.
        map: location of the page structures of fsdax and devdax: "dev" or "mem"; else None.
        uuid: as in the label.
        device: its device in the guest.
    """

    name: str
    region: str
    mode: str
    map: str | None
    uuid: str
    device: BlockDevice | CharacterDevice

    @property
    def path(self) -> str:
        """The path of its device."""
        return self.device.path

    @property
    def disk(self) -> BlockDevice:
        """Its block device.

        Raises:
            ContractError: it has no block device.
        """
        if not isinstance(self.device, BlockDevice):
            raise ContractError(f"{self.name} is {self.mode}: {self.path} is not a block device")
        return self.device

    @property
    def character_device(self) -> CharacterDevice:
        """Its character device.

        Raises:
            ContractError: it has none.
        """
        if not isinstance(self.device, CharacterDevice):
            raise ContractError(f"{self.name} is {self.mode}: {self.path} is a block device")
        return self.device


def parse_namespaces(dump: Dump, region: Region) -> tuple[Namespace, ...]:
    """The namespaces listed by ndctl, in the order of their numbers."""
    blob = dump.blobs.get("ndctl")
    try:
        # Without namespaces ndctl prints nothing.
        listed: Any = json.loads(dump.blobs["ndctl"] or "[]")
        entries = [listed] if isinstance(listed, dict) else [dict(entry) for entry in listed]
        namespaces = [_namespace(dump, region, entry) for entry in entries]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise HostError(
            f"ndctl's output for {region.name} is not as expected ({error!r}): {blob!r}"
        ) from error
    return tuple(sorted(namespaces, key=lambda ns: [int(n) for n in re.findall("[0-9]+", ns.name)]))


def present_namespace(dump: Dump, region: Region, mode: NamespaceMode) -> Namespace:
    """The namespace of this mode found by pmem's step "present"."""
    reported = {
        # A raw namespace has a disk of its own.
        "dev": dump.text("present_owner" if mode == "raw" else "present_namespace"),
        "mode": mode,
        "uuid": dump.text("present_uuid"),
        "chardev" if mode == "devdax" else "blockdev": dump.text("present_device"),
    }
    if mode in ("fsdax", "devdax"):
        place = dump.text("present_mode")
        if place not in _MAPS:
            raise ContractError(f"{region.name}: the mode of its page structures is {place!r}")
        reported["map"] = _MAPS[place]
    return _namespace(dump, region, reported)


def _namespace(dump: Dump, region: Region, fields: dict[str, Any]) -> Namespace:
    name, mode = str(fields["dev"]), str(fields["mode"])
    if not re.fullmatch(r"namespace[0-9]+\.[0-9]+", name) or mode not in PERSONALITIES:
        raise HostError(f"ndctl lists an unknown namespace of {region.name}: {fields}")
    if "blockdev" in fields:
        device: BlockDevice | CharacterDevice = _block_device(dump, region, str(fields["blockdev"]))
    else:
        # At the top level in `ndctl list`, below the dax region in `ndctl create-namespace`.
        inner = fields if "chardev" in fields else fields["daxregion"]["devices"][0]
        device = _character_device(dump, region, str(inner["chardev"]))
    # The device's parent in sysfs proves the mode.
    owner = PurePosixPath(dump.text(f"{device.name}/device")).relative_to(region.device).parts[0]
    if not re.fullmatch(PERSONALITIES[mode] + r"[0-9]+\.[0-9]+", owner):
        raise ContractError(
            f"{name} is {mode} according to ndctl, but its {device.name} is on {owner}"
        )
    map_ = fields["map"] if mode in ("fsdax", "devdax") else None
    if map_ not in (None, "dev", "mem"):
        raise HostError(f"the page structures of {name} are in {map_!r}")
    return Namespace(
        name=name, region=region.name, mode=mode, map=map_, uuid=str(fields["uuid"]), device=device
    )


def _block_device(dump: Dump, region: Region, name: str) -> BlockDevice:
    _check_owner(dump, region, name)
    read_only = dump.text(f"{name}/ro")
    if read_only not in ("0", "1"):
        raise ContractError(f"{name}/ro is {read_only!r}")
    return BlockDevice(
        name=name,
        path=f"/dev/{name}",
        region=region.name,
        # In units of 512 bytes, whatever the sector size is (include/linux/blk_types.h).
        size_bytes=dump.number(f"{name}/size") * 512,
        sector_bytes=dump.number(f"{name}/queue/logical_block_size"),
        read_only=read_only == "1",
        fua=dump.texts.get(f"{name}/queue/fua"),
        dax=dump.texts.get(f"{name}/queue/dax"),
        write_cache=dump.texts.get(f"{name}/queue/write_cache"),
    )


def _character_device(dump: Dump, region: Region, name: str) -> CharacterDevice:
    _check_owner(dump, region, name)
    return CharacterDevice(
        name=name,
        path=f"/dev/{name}",
        region=region.name,
        size_bytes=dump.number(f"{name}/size"),
        align_bytes=dump.number(f"{name}/align"),
    )


def _check_owner(dump: Dump, region: Region, name: str) -> None:
    """Verify in sysfs that the device is a child of the region."""
    if not re.fullmatch(r"[a-z0-9.]+", name):
        raise HostError(f"ndctl lists a device {name!r}")
    owner = PurePosixPath(dump.text(f"{name}/device"))
    if not owner.is_relative_to(region.device) or owner == PurePosixPath(region.device):
        raise ContractError(f"{name} is {owner}, which is not below {region.device}")
