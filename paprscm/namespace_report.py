# SPDX-License-Identifier: GPL-2.0-or-later
"""What the pmem script printed in the guest, as data: namespaces, their devices, mounts."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from paprscm.errors import ContractError, HostError
from paprscm.pmem_report import Dump, Region

PERSONALITIES: Final = {"fsdax": "pfn", "devdax": "dax", "sector": "btt", "raw": "namespace"}
"""What the device is a child of in sysfs, for each mode of a namespace (drivers/nvdimm)."""

_ANSWER: Final = re.compile(r"0|-1 (E[A-Z0-9]+)")


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
    """What mount(2) said, and what the kernel logged meanwhile.

    Attributes:
        errno_name: "EINVAL", for example; None: it succeeded.
        messages: the kernel's lines, without their times.
    """

    errno_name: str | None
    messages: tuple[str, ...]


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
