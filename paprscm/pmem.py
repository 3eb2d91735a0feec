# SPDX-License-Identifier: GPL-2.0-or-later
"""The nvdimm seen from inside the guest: its region by slot, its namespace, its file system.

A region is always found by its DRC index: regionN, nmemN and pmemN are numbered in the order in
which the driver came across them, which is not the order of the slots.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from paprscm.errors import ContractError
from paprscm.papr import drc_index
from paprscm.pmem_report import (
    BlockDevice,
    Dimm,
    Dump,
    Mount,
    Node,
    Region,
    RegionError,
    parse_block_device,
    parse_mount,
    parse_region,
)
from paprscm.pmem_script import script

if TYPE_CHECKING:
    from paprscm.guest import Guest

__all__ = [
    "BlockDevice",
    "DaxMount",
    "Dimm",
    "FsType",
    "Mount",
    "Node",
    "Region",
    "RegionError",
    "create_fsdax",
    "dax_mount",
    "make_filesystem",
    "mount",
    "region",
    "wait_for_region",
]

FsType = Literal["xfs", "ext4"]

_STEPS_LIMIT_S = 120.0
# What the script's step "find" ends with where there is no region.
_NO_REGION = 3


@dataclass(frozen=True, kw_only=True)
class DaxMount:
    """What `dax_mount` made: region, namespace and mounted file system.

    Attributes:
        page_size, block_size: of the guest's kernel and of the file system, bytes.
    """

    region: Region
    device: BlockDevice
    mount: Mount
    page_size: int
    block_size: int


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


def create_fsdax(guest: Guest, region: Region) -> BlockDevice:
    """Make an fsdax namespace of the whole region; its block device, proven to be the region's.

    Raises:
        ContractError: ndctl failed, or what it made belongs to another region.
    """
    dump = _run(guest, f"ndctl on {region.name}", ["find", "namespace"], slot=region.slot)
    return parse_block_device(dump, _same(region, parse_region(dump, region.slot)))


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


def dax_mount(
    guest: Guest,
    slot: int,
    fstype: FsType,
    mountpoint: str,
    *,
    block_size: int | None = None,
    options: str = "dax=always",
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
        timeout_s: how long to wait for the region, s.

    Raises:
        RegionError: no region.
        ContractError: ndctl, mkfs or mount failed; the message says which, and what it said.
    """
    values = {"fstype": fstype, "mountpoint": mountpoint, "options": options}
    values["block_size"] = str(block_size or "")
    steps = ["find", "namespace", "filesystem", "mount"]
    what = f"{fstype} on slot {slot}"
    dump = _run(guest, what, steps, values, slot=slot, timeout_s=timeout_s)
    found = parse_region(dump, slot)
    return DaxMount(
        region=found,
        device=parse_block_device(dump, found),
        mount=parse_mount(dump),
        page_size=dump.number("page_size"),
        block_size=dump.number("block_size"),
    )


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
    if result.status or not dump.complete:
        raise ContractError(
            f"{what}: step '{dump.step}' ended with status {result.status}:\n"
            f"{result.stderr.strip() or '(no message)'}"
        )
    return dump


def _said(dump: Dump) -> str:
    return f"\n  {dump.texts['trouble']}" if "trouble" in dump.texts else ""


def _same(before: Region, now: Region) -> Region:
    if before.name != now.name:
        raise ContractError(f"slot {now.slot} was {before.name} and is now {now.name}")
    return now
