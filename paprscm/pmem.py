# SPDX-License-Identifier: GPL-2.0-or-later
"""The nvdimm seen from inside the guest: its region by slot, its namespace, its file system.

A region is always found by its DRC index: regionN, nmemN and pmemN are numbered in the order in
which the driver came across them, which is not the order of the slots.
"""

from __future__ import annotations

import math
import re
import shlex
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from paprscm.errors import ContractError, HostError
from paprscm.namespace_report import (
    BlockDevice,
    CharacterDevice,
    Mount,
    MountAnswer,
    Namespace,
    parse_mount,
    parse_mount_answer,
    parse_namespaces,
)
from paprscm.papr import drc_index
from paprscm.pmem_report import Dimm, Dump, Node, Region, RegionError, parse_region
from paprscm.pmem_script import script

if TYPE_CHECKING:
    from paprscm.guest import Guest

__all__ = [
    "BlockDevice",
    "CharacterDevice",
    "DaxMount",
    "Dimm",
    "FsType",
    "Mount",
    "MountAnswer",
    "Namespace",
    "NamespaceMap",
    "NamespaceMode",
    "Node",
    "Region",
    "RegionError",
    "create_fsdax",
    "create_namespace",
    "dax_mount",
    "find_namespaces",
    "make_filesystem",
    "mount",
    "page_size",
    "partition",
    "place_in_file",
    "region",
    "try_mount",
    "wait_for_region",
]

FsType = Literal["xfs", "ext4"]
NamespaceMode = Literal["fsdax", "devdax", "raw", "sector"]
NamespaceMap = Literal["dev", "mem"]

_STEPS_LIMIT_S = 120.0
# What the script's step "find" ends with where there is no region.
_NO_REGION = 3


@dataclass(frozen=True, kw_only=True)
class DaxMount:
    """What `dax_mount` made or found: region, namespace and mounted file system.

    Attributes:
        page_size, block_size: of the guest's kernel and of the file system, bytes.
    """

    region: Region
    namespace: Namespace
    mount: Mount
    page_size: int
    block_size: int

    @property
    def device(self) -> BlockDevice:
        """The block device that the file system is on."""
        return self.namespace.disk


def region(guest: Guest, slot: int) -> Region:
    """The region of the nvdimm in `slot`, found by its DRC index, in one round trip.

    Raises:
        RegionError: there is none (the message names those that there are), or device tree and
            sysfs contradict each other.
    """
    return wait_for_region(guest, slot, 0)


def wait_for_region(guest: Guest, slot: int, timeout_s: float) -> Region:
    """The same, waiting in the guest until the region is there and its driver is bound.

    Args:
        slot: the memory slot.
        timeout_s: how long, by the guest's clock in whole seconds.
    """
    return parse_region(_run(guest, f"find {slot}", ["find"], slot=slot, timeout_s=timeout_s), slot)


def page_size(guest: Guest) -> int:
    """The page size of the guest's kernel, bytes: the block size that DAX wants."""
    line = guest.succeed("grep -m 1 KernelPageSize /proc/self/smaps")
    found = re.fullmatch(r"KernelPageSize:\s+([0-9]+) kB", line)
    if found is None:
        raise ContractError(f"/proc/self/smaps says {line!r}")
    return int(found[1]) * 1024


def place_in_file(guest: Guest, region: Region, device: CharacterDevice) -> int:
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
    values = _namespace_values(mode, map, size_bytes, align_bytes)
    what = f"ndctl on {region.name}"
    dump = _run(guest, what, ["find", "namespace"], values, slot=region.slot)
    return _made(dump, _same(region, parse_region(dump, region.slot)), mode, map)


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
    dump = _run(guest, f"ndctl on {region.name}", ["find", "namespaces"], slot=region.slot)
    return parse_namespaces(dump, _same(region, parse_region(dump, region.slot)))


def make_filesystem(
    guest: Guest, device: BlockDevice | str, fstype: FsType, block_size: int
) -> None:
    """Make a file system.

    Args:
        device: the block device, or its path.
        fstype: "xfs" or "ext4".
        block_size: of its blocks, bytes; DAX wants the guest's page size.

    Raises:
        ContractError: mkfs failed.
    """
    path = device.path if isinstance(device, BlockDevice) else device
    values = {"disk": path, "fstype": fstype, "block_size": str(block_size)}
    _run(guest, f"mkfs.{fstype} on {path}", ["filesystem"], values)


def mount(
    guest: Guest,
    device: BlockDevice | str,
    fstype: FsType,
    mountpoint: str,
    *,
    options: str = "dax=always",
) -> Mount:
    """Mount a file system; the mount point is made where it is missing.

    That it is mounted says nothing about DAX: XFS takes dax=always and silently turns it off
    where it cannot be (xfs_super.c:xfs_setup_dax_always). Only statx of a file proves it.

    Raises:
        ContractError: the kernel refused.
    """
    path = device.path if isinstance(device, BlockDevice) else device
    values = {"disk": path, "fstype": fstype, "mountpoint": mountpoint, "options": options}
    return parse_mount(_run(guest, f"mount {path}", ["mount"], values))


def try_mount(
    guest: Guest,
    device: BlockDevice | str,
    fstype: FsType,
    mountpoint: str,
    *,
    options: str = "dax=always",
) -> MountAnswer:
    """What mount(2) says, as an errno, and what the kernel logs meanwhile; for what is refused.

    A disk that is read-only is mounted read-only in the end, though the answer is EACCES: that is
    what mount programs do.

    Args:
        guest, device, fstype, mountpoint: as for `mount`.
        options: likewise; may be empty, may contain "remount".
    """
    path = device.path if isinstance(device, BlockDevice) else device
    values = {"disk": path, "fstype": fstype, "mountpoint": mountpoint, "options": options}
    return parse_mount_answer(_run(guest, f"mount {path}", ["try_mount"], values))


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
    dump = _run(guest, f"partitions of {disk.path}", ["partition"], values)
    names = [f"{disk.name}p{number}" for number in range(1, len(ranges) + 1)]
    wanted: dict[str, str] = {}
    for name, (start, size) in zip(names, sectors, strict=True):
        wanted |= {f"{name}/start": str(start), f"{name}/size": str(size)}
    if dump.texts != wanted:
        raise ContractError(f"{disk.path} has the partitions {dump.texts}, expected {wanted}")
    return [f"/dev/{name}" for name in names]


def dax_mount(
    guest: Guest,
    slot: int,
    fstype: FsType,
    mountpoint: str,
    *,
    block_size: int | None = None,
    options: str = "dax=always",
    reuse: bool = False,
    timeout_s: float = 10.0,
) -> DaxMount:
    """From an empty nvdimm to a mounted DAX file system, in one round trip.

    Args:
        guest: where.
        slot: the nvdimm's memory slot.
        fstype: "xfs" or "ext4".
        mountpoint: where to mount it.
        block_size: of the file system, bytes; None: the guest's page size, as DAX wants it.
        options: of mount.
        reuse: make nothing: mount the file system that is on the region's only namespace.
        timeout_s: how long to wait for the region, s.

    Raises:
        RegionError: no region.
        HostError: a program is missing or crashed, or its output is not as it should be.
        ContractError: ndctl, mkfs or mount failed; the message says which, and what it said. Or
            there is not exactly one namespace to reuse.
    """
    values = {"fstype": fstype, "mountpoint": mountpoint, "options": options}
    if reuse:
        if block_size is not None:
            raise ValueError("the block size of a file system that is there cannot be chosen")
        steps = ["find", "namespaces", "single", "mount"]
    else:
        values["block_size"] = str(block_size or "")
        values |= _namespace_values("fsdax", None, None, None)
        steps = ["find", "namespace", "filesystem", "mount"]
    what = f"{fstype} on slot {slot}"
    dump = _run(guest, what, steps, values, slot=slot, timeout_s=timeout_s)
    found = parse_region(dump, slot)
    if reuse:
        (namespace,) = parse_namespaces(dump, found)
    else:
        namespace = _made(dump, found, "fsdax", None)
    return DaxMount(
        region=found,
        namespace=namespace,
        mount=parse_mount(dump),
        page_size=dump.number("page_size"),
        block_size=dump.number("block_size"),
    )


def _namespace_values(
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


def _made(dump: Dump, region: Region, mode: NamespaceMode, map_: NamespaceMap | None) -> Namespace:
    """The one namespace that was made, as it was asked for."""
    namespaces = parse_namespaces(dump, region)
    if len(namespaces) != 1 or namespaces[0].mode != mode or map_ not in (None, namespaces[0].map):
        asked = f"{mode}, map {map_}" if map_ else mode
        raise ContractError(f"{region.name}: ndctl made {namespaces}, asked for was {asked}")
    return namespaces[0]


def _run(
    guest: Guest,
    what: str,
    steps: list[str],
    values: dict[str, str] | None = None,
    *,
    slot: int | None = None,
    timeout_s: float = 0.0,
) -> Dump:
    """Run steps of the script in the guest; what they printed, if they succeeded."""
    # One more, for the second that has already begun.
    given = {"wait_s": str(math.ceil(timeout_s) + 1 if timeout_s else 0), **(values or {})}
    if slot is not None:
        given["drc"] = f"{drc_index(slot):x}"
    # The script comes on stdin, so that the log of commands stays readable.
    settings = [f"{key}={value}" for key, value in given.items()]
    result = guest.run(
        shlex.join(["env", *settings, "sh", "-s", *steps]),
        stdin=script().encode(),
        timeout_s=timeout_s + _STEPS_LIMIT_S,
    )
    dump = Dump(result.stdout)
    if result.status == _NO_REGION and dump.step == "find" and slot is not None:
        there = "".join(f"\n  {name}: node {node}, {path}" for name, node, path in dump.found)
        raise RegionError(
            f"no region of slot {slot} (drc {drc_index(slot):#x}) within {timeout_s:g} s; "
            f"there are: {there or 'none'}{_said(dump)}"
        )
    message = result.stderr.strip() or "(no message)"
    if result.tool_failure:
        raise HostError(f"{what}: step '{dump.step}': {result.tool_failure}:\n{message}")
    if result.status:
        raise ContractError(
            f"{what}: step '{dump.step}' ended with status {result.status}:\n{message}"
        )
    if not dump.complete:
        raise HostError(f"{what}: the output ends in step '{dump.step}':\n{message}")
    return dump


def _said(dump: Dump) -> str:
    return f"\n  {dump.texts['trouble']}" if "trouble" in dump.texts else ""


def _same(before: Region, now: Region) -> Region:
    if before.name != now.name:
        raise ContractError(f"slot {now.slot} was {before.name} and is now {now.name}")
    return now
