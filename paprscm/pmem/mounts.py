# SPDX-License-Identifier: GPL-2.0-or-later
"""File systems on a DIMM: make, mount, and the answer of mount(2)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from paprscm.errors import HostError
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
    run_steps(guest, f"mkfs.{fstype} on {path}", ["filesystem"], values)


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
    return parse_mount(run_steps(guest, f"mount {path}", ["mount"], values))


def try_mount(
    guest: Guest,
    device: BlockDevice | str,
    fstype: FsType,
    mountpoint: str,
    *,
    options: str = "dax=always",
) -> MountAnswer:
    """Try mount(2): return its errno and the kernel's messages.

    A disk that is read-only is mounted read-only in the end, though the answer is EACCES: that is
    what mount programs do.

    Args:
        guest, device, fstype, mountpoint: as for `mount`.
        options: likewise; may be empty, may contain "remount".
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
    """From an nvdimm that is empty, or holds such a file system already, to its mount.

    A file system that the DIMM should hold (`Nvdimm.holds`) is made here for the first guest, and
    kept for the next ones.

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
    what = f"{fstype} on slot {slot}"
    make = ["find", "namespace", "filesystem"]
    if reuse:
        if block_size is not None:
            raise ValueError("the block size of a file system that is there cannot be chosen")
    else:
        values["block_size"] = str(block_size or "")
        values |= namespace_settings("fsdax", None, None, None)
        if block_size is None:
            reuse = guest.dimms.take(slot, fstype)
            if not reuse and guest.dimms.should_keep(slot, fstype):
                run_steps(guest, what, [*make, "sync"], values, slot=slot, timeout_s=timeout_s)
                guest.dimms.keep(slot)
                reuse = True
    steps = ["find", "present"] if reuse else make
    dump = run_steps(guest, what, [*steps, "mount"], values, slot=slot, timeout_s=timeout_s)
    found = parse_region(dump, slot)
    if reuse:
        namespace = present_namespace(dump, found)
    else:
        namespace = created_namespace(dump, found, "fsdax", None)
    return DaxMount(
        region=found,
        namespace=namespace,
        mount=parse_mount(dump),
        page_size=dump.number("page_size"),
        block_size=dump.number("block_size"),
    )


_ANSWER: Final = re.compile(r"0|-1 (E[A-Z0-9]+)")


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A mounted file system.

    Attributes:
        device: what is mounted.
        mountpoint: where.
        fstype: what the kernel calls it.
        options: as /proc/self/mounts has them: what the kernel made of those asked for.
    """

    device: str
    mountpoint: str
    fstype: str
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MountAnswer:
    """Answer of mount(2), and the kernel's messages.

    Attributes:
        errno_name: "EINVAL", for example; None: it succeeded.
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
    told = dump.text("mount_answer")
    answer = _ANSWER.fullmatch(told)
    if answer is None:
        raise HostError(f"strace says of mount(2): {told!r}")
    log = dump.blobs.get("messages", b"").decode("utf-8", "replace")
    return MountAnswer(
        errno_name=answer[1], messages=tuple(line for line in log.splitlines() if line.strip())
    )
