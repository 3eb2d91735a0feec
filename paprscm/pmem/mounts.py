# SPDX-License-Identifier: GPL-2.0-or-later
"""File systems on a DIMM: mkfs, mount, and the result of mount(2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from paprscm.guest.guest import Guest
from paprscm.pmem.dump import Dump, run_steps
from paprscm.pmem.namespaces import (
    BlockDevice,
    Namespace,
    created_namespace,
    namespace_settings,
    present_namespace,
)
from paprscm.pmem.regions import Region, parse_region

FsType = Literal["xfs", "ext4"]


@dataclass(frozen=True, kw_only=True)
class DaxMount:
    """Region, namespace and mounted file system of `dax_mount`.

    Attributes:
        page_size: page size of the guest's kernel, bytes.
        block_size: block size of the file system, bytes.
    """

    region: Region
    namespace: Namespace
    mount: Mount
    page_size: int
    block_size: int

    @property
    def device(self) -> BlockDevice:
        """The block device of the file system."""
        return self.namespace.disk


def make_filesystem(
    guest: Guest, device: BlockDevice | str, fstype: FsType, block_size: int
) -> None:
    """Make a file system.

    Args:
        device: the block device, or its path.
        fstype: "xfs" or "ext4".
        block_size: block size, bytes; DAX requires the guest's page size.

    Raises:
        ContractError: mkfs failed.
    """
    path = device.path if isinstance(device, BlockDevice) else device
    values = {"disk": path, "fstype": fstype, "block_size": str(block_size)}
    run_steps(guest, f"mkfs.{fstype} on {path}", ["filesystem"], values)


def mount(
    guest: Guest,
    device: BlockDevice | str,
    fstype: FsType,
    mountpoint: str,
    *,
    options: str = "dax=always",
) -> Mount:
    """Mount a file system; create the mount point if it is missing.

    A successful mount does not prove DAX: if DAX is impossible, XFS silently ignores dax=always
    (xfs_super.c:xfs_setup_dax_always). Only statx of a file proves it.

    Raises:
        ContractError: mount(2) failed.
    """
    path = device.path if isinstance(device, BlockDevice) else device
    values = {"disk": path, "fstype": fstype, "mountpoint": mountpoint, "options": options}
    return parse_mount(run_steps(guest, f"mount {path}", ["mount"], values))


def try_mount(
    guest: Guest,
    device: BlockDevice | str,
    fstype: FsType,
    mountpoint: str,
    *,
    options: str = "dax=always",
) -> MountAnswer:
    """Try mount(2); return its errno and the kernel's messages.

    Args:
        guest, device, fstype, mountpoint: as for `mount`.
        options: mount options; may be empty, may contain "remount".
    """
    path = device.path if isinstance(device, BlockDevice) else device
    values = {"disk": path, "fstype": fstype, "mountpoint": mountpoint, "options": options}
    return parse_mount_answer(run_steps(guest, f"mount {path}", ["try_mount"], values))


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
    """Mount a new DAX file system on an nvdimm, or one that it already holds, in one round trip.

    A file system that the DIMM should hold (`Nvdimm.holds`) is created for the first guest, and
    kept for the next ones.

    Args:
        guest: the guest.
        slot: the nvdimm's memory slot.
        fstype: "xfs" or "ext4".
        mountpoint: mount point.
        block_size: block size, bytes; None: the guest's page size, which DAX requires.
        options: mount options.
        reuse: create nothing; mount the file system on the region's only namespace.
        timeout_s: time to wait for the region, s.

    Raises:
        RegionError: no region.
        HostError: a program is missing or crashed, or its output is malformed.
        ContractError: ndctl, mkfs or mount failed; with its name and output. Or there is not
            exactly one namespace to reuse.
    """
    values = {"fstype": fstype, "mountpoint": mountpoint, "options": options}
    title = f"{fstype} on slot {slot}"
    make = ["find", "namespace", "filesystem"]
    values |= namespace_settings("fsdax", None, None, None)
    if reuse:
        if block_size is not None:
            raise ValueError("an existing file system has its block size already")
    else:
        values["block_size"] = str(block_size or "")
        if block_size is None:
            reuse = guest.dimms.take(slot, fstype)
            if not reuse and guest.dimms.should_keep(slot, fstype):
                run_steps(guest, title, [*make, "sync"], values, slot=slot, timeout_s=timeout_s)
                guest.dimms.keep(slot)
                reuse = True
    steps = ["find", "present"] if reuse else make
    dump = run_steps(guest, title, [*steps, "mount"], values, slot=slot, timeout_s=timeout_s)
    region = parse_region(dump, slot)
    if reuse:
        namespace = present_namespace(dump, region, "fsdax")
    else:
        namespace = created_namespace(dump, region, "fsdax", None)
    return DaxMount(
        region=region,
        namespace=namespace,
        mount=parse_mount(dump),
        page_size=dump.number("page_size"),
        block_size=dump.number("block_size"),
    )


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A mounted file system.

    Attributes:
        device: path of the block device.
        mountpoint: mount point.
        fstype: type, as named by the kernel.
        options: effective options in /proc/self/mounts.
    """

    device: str
    mountpoint: str
    fstype: str
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MountAnswer:
    """Result of mount(2), and the kernel's messages.

    Attributes:
        errno_name: such as "EINVAL"; None: it succeeded.
        messages: the kernel's lines, without their times.
    """

    errno_name: str | None
    messages: tuple[str, ...]


def parse_mount(dump: Dump) -> Mount:
    return Mount(
        device=dump.text("mount_device"),
        mountpoint=dump.text("mountpoint"),
        fstype=dump.text("mount_fstype"),
        options=tuple(dump.text("mount_options").split(",")),
    )


def parse_mount_answer(dump: Dump) -> MountAnswer:
    log = dump.blobs.get("messages", b"").decode("utf-8", "replace")
    return MountAnswer(
        errno_name=dump.text("mount_errno") or None,
        messages=tuple(line for line in log.splitlines() if line.strip()),
    )
