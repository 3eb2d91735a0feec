# SPDX-License-Identifier: GPL-2.0-or-later
"""What the pmem script printed in the guest, as data: region and device tree node."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from paprscm.errors import ContractError, HostError
from paprscm.papr import Property, drc_index

_OD_LINE: Final = re.compile(r"(?: [0-9a-f]{2})+")


class RegionError(ContractError):
    """The guest has no region for the slot, or it is not what the device tree says."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """The device tree node of one nvdimm, as the guest's kernel got it.

    Attributes:
        path: below /proc/device-tree, "/ibm,persistent-memory/ibm,pmemory@90000000".
        raw: each property in binary.
        drc_index, block_size, number_of_blocks, metadata_size: the numbers; bytes and counts.
        unit_guid, device_type, application: the strings.
        compatible: the list of strings.
        cache_flush_required, hcall_flush_required: whether the empty property is there.

    A property that is not there is None.
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
class Dimm:
    """The nmem device behind a region.

    Attributes:
        name: "nmem0".
        flags: of libnvdimm, a subset of "label", "lock"; None if there is no such file.
        papr_flags: of papr_scm, such as "not_armed", "flush_fail"; empty when healthy.
        dirty_shutdown: how often the contents were not saved.
    """

    name: str
    flags: frozenset[str] | None
    papr_flags: frozenset[str] | None
    dirty_shutdown: int | None


@dataclass(frozen=True, kw_only=True)
class Region:
    """One libnvdimm region, which is one nvdimm here.

    Attributes:
        name: "region0"; says nothing about the slot.
        slot, drc: the memory slot, and the DRC index that made this the region of that slot.
        device: its path in sysfs.
        node: its device tree node.
        dimm: its nmem device; None if the region has no mapping.
        deep_flush: "1": the region has a flush of its own, "0": it has none; None: not shown.
        deep_flush_mode: the permissions of that file, such as 0o644.
        persistence_domain: "memory_controller", "cpu_cache" or ""; None: not shown.
        size_bytes: what it holds, without the label area.
        read_only: the kernel refuses to write to it.
        align_bytes: the alignment that namespaces must have.
        nstype: the kind of its namespaces; 5 is persistent memory with labels.
    """

    name: str
    slot: int
    drc: int
    device: str
    node: Node
    dimm: Dimm | None
    deep_flush: str | None
    deep_flush_mode: int | None
    persistence_domain: str | None
    size_bytes: int
    read_only: bool
    align_bytes: int | None
    nstype: int


class Dump:
    """What the script printed, parsed strictly.

    The lines are described in pmem_script.

    Raises:
        HostError: the output is anything else.
    """

    def __init__(self, output: str) -> None:
        self.texts: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}
        self.found: list[tuple[str, str, str]] = []
        self.sizes: dict[str, int] = {}
        self.step = ""
        self.complete = False
        blob: str | None = None
        for line in output.removesuffix("\n").split("\n") if output else ():
            word, _, rest = line.partition(" ")
            key, _, value = rest.partition(" ")
            if self.complete:
                raise HostError(f"output after the end of the pmem script: {line!r}")
            if blob is not None and _OD_LINE.fullmatch(line):
                self.blobs[blob] += bytes.fromhex(line)
                continue
            blob = None
            if word == "text" and key and key not in self.texts:
                self.texts[key] = value
            elif word == "blob" and key and not value and key not in self.blobs:
                self.blobs[blob := key] = b""
            elif word == "found" and len(parts := rest.split(" ")) == 3:
                self.found.append((parts[0], parts[1], parts[2]))
            elif word == "prop" and key.isdecimal() and value and value not in self.sizes:
                self.sizes[value] = int(key)
            elif word == "step" and key and not value:
                self.step = key
            elif line == "done":
                self.complete = True
            else:
                raise HostError(f"the pmem script printed what it should not: {line!r}")

    def text(self, key: str) -> str:
        try:
            return self.texts[key]
        except KeyError:
            raise ContractError(f"the guest has no {key}; it has {sorted(self.texts)}") from None

    def number(self, key: str) -> int:
        text = self.text(key)
        if not re.fullmatch(r"[0-9]+|0x[0-9a-f]+", text):
            raise ContractError(f"{key} is no number: {text!r}")
        return int(text, 0)

    def properties(self) -> dict[str, bytes]:
        rest, found = self.blobs.get("props", b""), {}
        if len(rest) != sum(self.sizes.values()):
            raise HostError(f"{len(rest)} bytes of properties whose sizes are {self.sizes}")
        for name, size in self.sizes.items():
            found[name], rest = rest[:size], rest[size:]
        return found

    def words(self, key: str) -> frozenset[str] | None:
        return frozenset(self.texts[key].split()) if key in self.texts else None


def parse_region(dump: Dump, slot: int) -> Region:
    node = _node(dump)
    drc = drc_index(slot)
    name = dump.text("region")
    if node.drc_index != drc:
        told = "none" if node.drc_index is None else f"{node.drc_index:#x}"
        raise RegionError(
            f"{name} belongs to {node.path}, whose {Property.DRC_INDEX} is {told}, not {drc:#x}"
        )
    dimm = None
    if "mapping0" in dump.texts:
        dirty = "papr/dirty_shutdown"
        dimm = Dimm(
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
        deep_flush_mode=_mode(dump),
        persistence_domain=dump.texts.get("persistence_domain"),
        size_bytes=dump.number("size"),
        read_only=read_only == "1",
        align_bytes=dump.number("align") if "align" in dump.texts else None,
        nstype=dump.number("nstype"),
    )


def _mode(dump: Dump) -> int | None:
    mode = dump.texts.get("deep_flush_mode")
    if mode is not None and not re.fullmatch("[0-7]{3,4}", mode):
        raise HostError(f"the mode of deep_flush is {mode!r}")
    return None if mode is None else int(mode, 8)


def _node(dump: Dump) -> Node:
    path = dump.text("node")
    raw = dump.properties()

    def refuse(name: str, wanted: str) -> ContractError:
        return ContractError(f"{path}: {name} is {raw[name].hex(' ') or 'empty'}, not {wanted}")

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
        found = strings(name)
        if found is not None and len(found) != 1:
            raise refuse(name, "one string")
        return found[0] if found else None

    def flag(name: str) -> bool:
        if raw.get(name):
            raise refuse(name, "empty")
        return name in raw

    return Node(
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
