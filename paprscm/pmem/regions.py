# SPDX-License-Identifier: GPL-2.0-or-later
"""Regions of DIMMs, found by DRC index, and their device tree nodes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from paprscm.errors import ContractError
from paprscm.guest.guest import Guest
from paprscm.papr import Property, drc_index
from paprscm.pmem.dump import Dump, RegionError, run_steps


@dataclass(frozen=True, kw_only=True)
class NvdimmNode:
    """The device tree node of one nvdimm, as read by the guest's kernel.

    Attributes:
        path: below /proc/device-tree, "/ibm,persistent-memory/ibm,pmemory@90000000".
        raw: content of each property.
        drc_index, block_size, number_of_blocks, metadata_size: numbers; sizes in bytes.
        unit_guid, device_type, application: strings.
        compatible: list of strings.
        cache_flush_required, hcall_flush_required: True if the empty property exists.

    A missing property is None.
    """

    path: str
    raw: dict[str, bytes]
    drc_index: int | None
    block_size: int | None
    number_of_blocks: int | None
    metadata_size: int | None
    unit_guid: str | None
    device_type: str | None
    application: str | None
    compatible: tuple[str, ...] | None
    cache_flush_required: bool
    hcall_flush_required: bool


@dataclass(frozen=True, kw_only=True)
class Nmem:
    """The nmem device behind a region.

    Attributes:
        name: "nmem0".
        flags: flags of libnvdimm, a subset of "label", "lock"; None: no such file.
        papr_flags: flags of papr_scm, such as "not_armed", "flush_fail"; empty if healthy.
        dirty_shutdown: number of shutdowns without saved contents.
    """

    name: str
    flags: frozenset[str] | None
    papr_flags: frozenset[str] | None
    dirty_shutdown: int | None


@dataclass(frozen=True, kw_only=True)
class Region:
    """One libnvdimm region, here of one nvdimm.

    Attributes:
        name: "region0"; unrelated to the slot.
        slot, drc: memory slot and DRC index.
        device: its path in sysfs.
        node: its device tree node.
        dimm: its nmem device; None if the region has no mapping.
        deep_flush: "1": the region has a flush function, "0": it has none; None: no such file.
        deep_flush_mode: the permissions of that file, such as 0o644.
        persistence_domain: "memory_controller", "cpu_cache" or ""; None: no such file.
        size_bytes: its size, without the label area.
        read_only: the kernel refuses writes.
        align_bytes: the required alignment of namespaces.
        nstype: the type of its namespaces; 5 is persistent memory with labels.
    """

    name: str
    slot: int
    drc: int
    device: str
    node: NvdimmNode
    dimm: Nmem | None
    deep_flush: str | None
    deep_flush_mode: int | None
    persistence_domain: str | None
    size_bytes: int
    read_only: bool
    align_bytes: int | None
    nstype: int


def parse_region(dump: Dump, slot: int) -> Region:
    node = _node(dump)
    drc = drc_index(slot)
    name = dump.text("region")
    if node.drc_index != drc:
        index = "none" if node.drc_index is None else f"{node.drc_index:#x}"
        raise RegionError(
            f"{name} belongs to {node.path}, whose {Property.DRC_INDEX} is {index}, not {drc:#x}"
        )
    dimm = None
    if "mapping0" in dump.texts:
        dirty = "papr/dirty_shutdown"
        dimm = Nmem(
            name=dump.text("mapping0").partition(",")[0],
            flags=dump.words("flags"),
            papr_flags=dump.words("papr/flags"),
            dirty_shutdown=dump.number(dirty) if dirty in dump.texts else None,
        )
    read_only = dump.text("read_only")
    if read_only not in ("0", "1"):
        raise ContractError(f"{name}/read_only is {read_only!r}")
    return Region(
        name=name,
        slot=slot,
        drc=drc,
        device=dump.text("device"),
        node=node,
        dimm=dimm,
        deep_flush=dump.texts.get("deep_flush"),
        deep_flush_mode=dump.modes.get(f"{dump.text('device')}/deep_flush"),
        persistence_domain=dump.texts.get("persistence_domain"),
        size_bytes=dump.number("size"),
        read_only=read_only == "1",
        align_bytes=dump.number("align") if "align" in dump.texts else None,
        nstype=dump.number("nstype"),
    )


def _node(dump: Dump) -> NvdimmNode:
    path = dump.text("node")
    raw = dump.properties()

    def refuse(name: str, expected: str) -> ContractError:
        return ContractError(f"{path}: {name} is {raw[name].hex(' ') or 'empty'}, not {expected}")

    def number(name: str, size: int) -> int | None:
        if name in raw and len(raw[name]) != size:
            raise refuse(name, f"a number of {size} bytes")
        return int.from_bytes(raw[name], "big") if name in raw else None

    def strings(name: str) -> tuple[str, ...] | None:
        if name not in raw:
            return None
        if not re.fullmatch(rb"([\x20-\x7e]+\x00)+", raw[name]):
            raise refuse(name, "text that ends with a zero byte")
        return tuple(raw[name].decode("ascii").removesuffix("\0").split("\0"))

    def string(name: str) -> str | None:
        texts = strings(name)
        if texts is not None and len(texts) != 1:
            raise refuse(name, "one string")
        return texts[0] if texts else None

    def flag(name: str) -> bool:
        if raw.get(name):
            raise refuse(name, "empty")
        return name in raw

    return NvdimmNode(
        path=path.partition("/devicetree/base")[2] or path,
        raw=raw,
        drc_index=number(Property.DRC_INDEX, 4),
        block_size=number(Property.BLOCK_SIZE, 8),
        number_of_blocks=number(Property.NUMBER_OF_BLOCKS, 8),
        metadata_size=number(Property.METADATA_SIZE, 4),
        unit_guid=string(Property.UNIT_GUID),
        device_type=string(Property.DEVICE_TYPE),
        application=string(Property.APPLICATION),
        compatible=strings(Property.COMPATIBLE),
        cache_flush_required=flag(Property.CACHE_FLUSH_REQUIRED),
        hcall_flush_required=flag(Property.HCALL_FLUSH_REQUIRED),
    )


def find_region(guest: Guest, slot: int) -> Region:
    """Find the region of the nvdimm in `slot` by its DRC index, in one round trip.

    Raises:
        RegionError: there is none (the message lists the existing ones), or device tree and sysfs
            contradict each other.
    """
    return wait_for_region(guest, slot, 0)


def wait_for_region(guest: Guest, slot: int, timeout_s: float = 30.0) -> Region:
    """Wait in the guest until the region exists and its driver is bound; return it.

    Args:
        guest: the guest.
        slot: the memory slot.
        timeout_s: time limit by the guest's clock, s.

    Raises:
        RegionError: as find_region().
    """
    return parse_region(
        run_steps(guest, f"find {slot}", ["find"], slot=slot, timeout_s=timeout_s), slot
    )


def read_page_size(guest: Guest) -> int:
    """The page size of the guest's kernel, bytes: the block size that DAX requires."""
    line = guest.succeed("grep -m 1 KernelPageSize /proc/self/smaps")
    match = re.fullmatch(r"KernelPageSize:\s+([0-9]+) kB", line)
    if match is None:
        raise ContractError(f"/proc/self/smaps has {line!r}")
    return int(match[1]) * 1024


def same_region(before: Region, now: Region) -> Region:
    if before.name != now.name:
        raise ContractError(f"slot {now.slot} was {before.name} and is now {now.name}")
    return now
