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
    """Where a devdax device begins in the DIMM's backing file, bytes.

    It begins behind the namespace's own data; where, say the physical addresses of both. The file
    begins with the region, and has the label area at its end.
    """
    folders = f"/sys/bus/dax/devices/{device.name}", region.device
    begins = guest.succeed(" && ".join(f"cat {folder}/resource" for folder in folders))
    start, region_start = (int(line, 16) for line in begins.split("\n"))
    return start - region_start


def create_namespace(
    guest: Guest,
    region: Region,
    *,
    mode: NamespaceMode,
    map: NamespaceMap | None = None,  # noqa: A002 - ndctl's word
    size_bytes: int | None = None,
    align_bytes: int | None = None,
) -> Namespace:
    """Make a namespace; what its device is, proven to be the region's, in one round trip.

    Args:
        guest: where.
        region: where there.
        mode: "fsdax", "devdax", "raw" or "sector".
        map: where the page structures of fsdax and devdax are; None: "dev", on the DIMM itself.
        size_bytes: of it and its own data, a multiple of the region's `align_bytes`; None: all
            that is left of the region.
        align_bytes: of fsdax and devdax; None: what ndctl takes.

    Raises:
        ContractError: ndctl failed, or what it made belongs to another region or is of another
            mode.
    """
    values = namespace_settings(mode, map, size_bytes, align_bytes)
    what = f"ndctl on {region.name}"
    dump = run_steps(guest, what, ["find", "namespace"], values, slot=region.slot)
    return created_namespace(dump, same_region(region, parse_region(dump, region.slot)), mode, map)


def create_fsdax(guest: Guest, region: Region) -> BlockDevice:
    """Make an fsdax namespace of the whole region; its block device, proven to be the region's.

    Raises:
        ContractError: ndctl failed, or what it made belongs to another region.
    """
    return create_namespace(guest, region, mode="fsdax").disk


def find_namespaces(guest: Guest, region: Region) -> tuple[Namespace, ...]:
    """The namespaces that a region has, by their numbers; those of a boot before, for example.

    Raises:
        ContractError: a device that ndctl names is not the region's, or not what ndctl says.
    """
    dump = run_steps(guest, f"ndctl on {region.name}", ["find", "namespaces"], slot=region.slot)
    return parse_namespaces(dump, same_region(region, parse_region(dump, region.slot)))


def partition(guest: Guest, disk: BlockDevice, ranges: Sequence[tuple[int, int]]) -> list[str]:
    """Partitions of a disk, wherever they are to begin and end; their paths.

    Args:
        guest: where.
        disk: what is on it is lost.
        ranges: start and size of each, bytes, in whole sectors of 512; four at the most.

    Raises:
        ContractError: partx failed, or the kernel has other partitions than these.
    """
    sectors = [(start // 512, size // 512) for start, size in ranges]
    if [(512 * start, 512 * size) for start, size in sectors] != list(ranges) or len(ranges) > 4:
        raise ValueError(f"an MBR cannot hold {ranges}")
    # A boot flag, CHS numbers that mean "see LBA", type Linux, start and size
    # (block/partitions/msdos.c, include/linux/msdos_partition.h).
    chs = bytes.fromhex("feffff")
    table = b"".join(b"\0" + chs + b"\x83" + chs + struct.pack("<II", *one) for one in sectors)
    table = table.ljust(64, b"\0") + b"\x55\xaa"
    values = {"disk": disk.path, "table": "".join(f"\\{byte:03o}" for byte in table)}
    dump = run_steps(guest, f"partitions of {disk.path}", ["partition"], values)
    names = [f"{disk.name}p{number}" for number in range(1, len(ranges) + 1)]
    wanted: dict[str, str] = {}
    for name, (start, size) in zip(names, sectors, strict=True):
        wanted |= {f"{name}/start": str(start), f"{name}/size": str(size)}
    if dump.texts != wanted:
        raise ContractError(f"{disk.path} has the partitions {dump.texts}, expected {wanted}")
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
    """The one namespace that was made, as it was asked for."""
    namespaces = parse_namespaces(dump, region)
    if len(namespaces) != 1 or namespaces[0].mode != mode or map_ not in (None, namespaces[0].map):
        asked = f"{mode}, map {map_}" if map_ else mode
        raise ContractError(f"{region.name}: ndctl made {namespaces}, asked for was {asked}")
    return namespaces[0]


PERSONALITIES: Final = {"fsdax": "pfn", "devdax": "dax", "sector": "btt", "raw": "namespace"}
"""Parent of the device in sysfs, for each mode of a namespace (drivers/nvdimm)."""


@dataclass(frozen=True, kw_only=True)
class BlockDevice:
    """The block device of a namespace.

    Attributes:
        name, path: "pmem0", "/dev/pmem0".
        region: the region that it was proven to belong to.
        size_bytes: what is left for a file system.
        sector_bytes: its logical block size.
        read_only: the kernel refuses to write to it.
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
        region: the region that it was proven to belong to.
        size_bytes: what can be mapped.
        align_bytes: what offset and length of a mapping must be multiples of.
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
        region: the region that its device was proven to belong to.
        mode: "fsdax", "devdax", "raw" or "sector", as the device's place in sysfs proves it.
        map: where the page structures of fsdax and devdax are: "dev" or "mem"; else None.
        uuid: as the label has it.
        device: what it is in the guest.
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
            ContractError: it has none.
        """
        if not isinstance(self.device, BlockDevice):
            raise ContractError(f"{self.name} is {self.mode}: {self.path} is no block device")
        return self.device


def parse_namespaces(dump: Dump, region: Region) -> tuple[Namespace, ...]:
    """The namespaces that ndctl named, in the order of their numbers."""
    blob = dump.blobs.get("ndctl")
    try:
        # Where there is none, ndctl prints nothing.
        told: Any = json.loads(dump.blobs["ndctl"] or "[]")
        entries = [told] if isinstance(told, dict) else [dict(entry) for entry in told]
        found = [_namespace(dump, region, entry) for entry in entries]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise HostError(
            f"ndctl's output for {region.name} is not as expected ({error!r}): {blob!r}"
        ) from error
    return tuple(sorted(found, key=lambda ns: [int(n) for n in re.findall("[0-9]+", ns.name)]))


def _namespace(dump: Dump, region: Region, told: dict[str, Any]) -> Namespace:
    name, mode = str(told["dev"]), str(told["mode"])
    if not re.fullmatch(r"namespace[0-9]+\.[0-9]+", name) or mode not in PERSONALITIES:
        raise HostError(f"ndctl names a namespace of {region.name} as no ndctl should: {told}")
    if "blockdev" in told:
        device: BlockDevice | CharacterDevice = _block_device(dump, region, str(told["blockdev"]))
    else:
        # `ndctl list` names it at once, `ndctl create-namespace` below the dax region.
        inner = told if "chardev" in told else told["daxregion"]["devices"][0]
        device = _character_device(dump, region, str(inner["chardev"]))
    # What it was made into shows in what its device is a child of.
    owner = PurePosixPath(dump.text(f"{device.name}/device")).relative_to(region.device).parts[0]
    if not re.fullmatch(PERSONALITIES[mode] + r"[0-9]+\.[0-9]+", owner):
        raise ContractError(f"{name} is {mode} for ndctl, but its {device.name} is on {owner}")
    map_ = told["map"] if mode in ("fsdax", "devdax") else None
    if map_ not in (None, "dev", "mem"):
        raise HostError(f"ndctl has {name}'s page structures in {map_!r}")
    return Namespace(
        name=name, region=region.name, mode=mode, map=map_, uuid=str(told["uuid"]), device=device
    )


def _block_device(dump: Dump, region: Region, name: str) -> BlockDevice:
    _belongs(dump, region, name)
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
    _belongs(dump, region, name)
    return CharacterDevice(
        name=name,
        path=f"/dev/{name}",
        region=region.name,
        size_bytes=dump.number(f"{name}/size"),
        align_bytes=dump.number(f"{name}/align"),
    )


def _belongs(dump: Dump, region: Region, name: str) -> None:
    """ndctl was told the region's name; what counts is whose child the device is."""
    if not re.fullmatch(r"[a-z0-9.]+", name):
        raise HostError(f"ndctl names a device {name!r}")
    owner = PurePosixPath(dump.text(f"{name}/device"))
    if not owner.is_relative_to(region.device) or owner == PurePosixPath(region.device):
        raise ContractError(f"{name} is {owner}, which is not below {region.device}")
