# SPDX-License-Identifier: GPL-2.0-or-later
"""The device tree that QEMU gives a guest, and what it must say of persistent memory."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fdt

from paprscm.errors import ContractError
from paprscm.papr import DRC_TYPE_PMEM, NODE, PARENT_NODE, SCM_BLOCK_SIZE, Property, drc_index

_HEADER = struct.Struct(">10I")
_END = struct.pack(">I", 9)


@dataclass(frozen=True)
class TreeNode:
    """One node: its path and its properties, as bytes; a getter says what is wrong with one."""

    path: str
    properties: Mapping[str, bytes]

    def cells(self, name: str) -> tuple[int, ...]:
        """A property as 32-bit numbers."""
        value = self._value(name)
        if len(value) % 4:
            raise ContractError(f"{self.path}: {name} has {len(value)} bytes: no 32-bit numbers")
        return struct.unpack(f">{len(value) // 4}I", value)

    def cell(self, name: str) -> int:
        """A property as one 32-bit number."""
        cells = self.cells(name)
        if len(cells) != 1:
            raise ContractError(f"{self.path}: {name} has {len(cells)} cells instead of one")
        return cells[0]

    def strings(self, name: str, *, offset: int = 0) -> tuple[str, ...]:
        """A property as strings, each ended by a NUL; from byte `offset` on."""
        value = self._value(name)[offset:]
        if value and not value.endswith(b"\0"):
            raise ContractError(f"{self.path}: {name} does not end with a NUL")
        try:
            return tuple(part.decode("ascii") for part in value.split(b"\0")[:-1])
        except UnicodeDecodeError:
            raise ContractError(f"{self.path}: {name} is not text: {value!r}") from None

    def _value(self, name: str) -> bytes:
        if name not in self.properties:
            raise ContractError(f"{self.path} has no {name}")
        return self.properties[name]


@dataclass(frozen=True)
class Connector:
    """One DRC of a node's ibm,drc-* lists (LoPAR, "Dynamic Reconfiguration")."""

    index: int
    power_domain: int
    name: str
    kind: str


@dataclass(frozen=True)
class DeviceTree:
    """A device tree: its nodes by their paths; "/" is the root."""

    nodes: Mapping[str, TreeNode]

    def node(self, path: str) -> TreeNode:
        """The node of that path.

        Raises:
            ContractError: there is none.
        """
        if path not in self.nodes:
            raise ContractError(f"the device tree has no {path}")
        return self.nodes[path]

    @property
    def parent(self) -> TreeNode:
        """/ibm,persistent-memory."""
        return self.node(f"/{PARENT_NODE}")

    @property
    def nvdimms(self) -> dict[int, TreeNode]:
        """The nodes of the DIMMs, by the DRC index in their unit addresses.

        Raises:
            ContractError: something below /ibm,persistent-memory is not a DIMM.
        """
        found: dict[int, TreeNode] = {}
        start = f"{self.parent.path}/"
        for path, node in self.nodes.items():
            if not path.startswith(start):
                continue
            name = re.fullmatch(rf"{NODE}@([1-9a-f][0-9a-f]*)", path.removeprefix(start))
            if name is None:
                raise ContractError(f"{path} is not the name of a persistent memory node")
            found[int(name[1], 16)] = node
        return found

    @property
    def connectors(self) -> tuple[Connector, ...]:
        """The DRCs that the root announces, of all types.

        Raises:
            ContractError: the four lists do not have the same length, or not the one they say.
        """
        root = self.node("/")
        numbers = [root.cells(name) for name in ("ibm,drc-indexes", "ibm,drc-power-domains")]
        texts = [root.strings(name, offset=4) for name in ("ibm,drc-names", "ibm,drc-types")]
        said = [cells[0] for cells in numbers if cells]
        said += [_first(root.properties[name]) for name in ("ibm,drc-names", "ibm,drc-types")]
        there = [len(cells) - 1 for cells in numbers] + [len(strings) for strings in texts]
        if said != there or len(set(said)) != 1:
            raise ContractError(
                f"the lists ibm,drc-* of the root say that they have {said} entries, "
                f"and have {there}"
            )
        rows = zip(numbers[0][1:], numbers[1][1:], *texts, strict=True)
        return tuple(Connector(*row) for row in rows)


def parse_tree(blob: bytes) -> DeviceTree:
    """Read a flattened device tree; what follows its structure and strings is padding.

    Raises:
        ContractError: it is none (Devicetree Specification 0.4, chapter 5), or two nodes have the
            same phandle.
    """
    _check_header(blob)
    try:
        found = fdt.parse_dtb(blob)
    except Exception as error:  # the library has no class of its own
        raise ContractError(f"the device tree cannot be read: {error}") from error
    if found.root is None:
        raise ContractError("the device tree has no root")
    nodes = dict(_walk(found.root, "/"))
    phandles = Counter(
        node.cell("phandle") for node in nodes.values() if "phandle" in node.properties
    )
    twice = [number for number, times in phandles.items() if times > 1]
    if twice:
        raise ContractError(f"several nodes have the phandle {twice[0]}")
    return DeviceTree(nodes)


def _check_header(blob: bytes) -> None:
    if len(blob) < _HEADER.size:
        raise ContractError(f"a device tree of {len(blob)} bytes has no header")
    magic, total, structure, strings, _, _, _, _, strings_size, size = _HEADER.unpack_from(blob)
    if magic != 0xD00DFEED:
        raise ContractError(f"the device tree begins with {magic:#x} instead of 0xd00dfeed")
    if total != len(blob):
        raise ContractError(f"the device tree says that it has {total} bytes, and has {len(blob)}")
    for name, offset, length in (
        ("structure", structure, size),
        ("strings", strings, strings_size),
    ):
        if offset + length > total:
            raise ContractError(f"the device tree's {name} block goes beyond its end")
    if blob[structure + size - 4 : structure + size] != _END:
        raise ContractError("the device tree's structure block does not end with FDT_END")


def _walk(node: Any, path: str) -> Iterator[tuple[str, TreeNode]]:
    yield path, TreeNode(path, {item.name: _raw(item) for item in node.props})
    for child in node.nodes:
        yield from _walk(child, f"{path.rstrip('/')}/{child.name}")


def _raw(item: Any) -> bytes:
    """The bytes of a property, of which the library has guessed the type."""
    if isinstance(item, fdt.PropStrings):
        return b"".join(text.encode("ascii") + b"\0" for text in item.data)
    if isinstance(item, fdt.PropWords):
        return struct.pack(f">{len(item.data)}I", *item.data)
    return bytes(item.data) if isinstance(item, fdt.PropBytes) else b""


def _first(value: bytes) -> int:
    return int.from_bytes(value[:4], "big")


def _text(value: str) -> bytes:
    return value.encode("ascii") + b"\0"


def _cells(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def flushes_by_hcall(driver: str, *, pmem: bool, pmem_override: bool) -> bool:
    """Return True if the guest must call H_SCM_FLUSH: QEMU commit 8601b4f11d47 (in v7.0).

    Args:
        driver: "spapr-nvdimm", or "nvdimm", of which it is never asked.
        pmem, pmem_override: of the backend, and of the device.
    """
    return driver == "spapr-nvdimm" and (not pmem or pmem_override)


def associativity(node: int) -> tuple[int, ...]:
    """ibm,associativity of what is in a NUMA node, of a machine without -numa dist.

    Before the guest has negotiated anything the form is 1: a length, three domains, and the node's
    own number, the primary domain. Any two nodes are at distance 20 then, which for Linux
    (arch/powerpc/mm/numa.c, __node_distance) means that they share every domain but the primary
    one; and those of node 0 are all 0 (LoPAR, "Form 1"; QEMU hw/ppc/spapr_numa.c).
    """
    return (4, 0, 0, 0, node)


def distance(first: Sequence[int], second: Sequence[int]) -> int:
    """NUMA distance that Linux computes from two ibm,associativity of form 1; 10: the same node.

    Linux arch/powerpc/mm/numa.c (__node_distance): twice as far for each reference point at
    which they differ, from the primary one (4) on; QEMU's reference points are 4, 3, 2, 1.
    """
    found = 10
    for level in (4, 3, 2, 1):
        if first[level] == second[level]:
            break
        found *= 2
    return found


def expected_node(
    *,
    slot: int,
    driver: str,
    pmem: bool,
    pmem_override: bool,
    uuid: str,
    label_bytes: int,
    size_bytes: int,
    associativity: Sequence[int],
) -> dict[str, bytes]:
    """All properties that a DIMM's node must have (QEMU spapr_nvdimm.c:spapr_dt_nvdimm).

    Args:
        slot: where it was put.
        driver, pmem, pmem_override, uuid, label_bytes: as on the command line.
        size_bytes: what the guest can use, without the label area.
        associativity: see associativity().
    """
    drc = drc_index(slot)
    node = {
        Property.REG: _cells(drc),
        Property.DRC_INDEX: _cells(drc),
        Property.COMPATIBLE: _text(NODE),
        Property.DEVICE_TYPE: _text(NODE),
        Property.ASSOCIATIVITY: _cells(*associativity),
        Property.UNIT_GUID: _text(uuid.lower()),
        Property.BLOCK_SIZE: SCM_BLOCK_SIZE.to_bytes(8, "big"),
        Property.NUMBER_OF_BLOCKS: (size_bytes // SCM_BLOCK_SIZE).to_bytes(8, "big"),
        Property.METADATA_SIZE: label_bytes.to_bytes(4, "big"),
        Property.APPLICATION: _text("operating-system"),
        Property.CACHE_FLUSH_REQUIRED: b"",
    }
    if flushes_by_hcall(driver, pmem=pmem, pmem_override=pmem_override):
        node[Property.HCALL_FLUSH_REQUIRED] = b""
    return {str(name): value for name, value in node.items()}


PARENT: Mapping[str, bytes] = {
    "device_type": _text(PARENT_NODE),
    "#address-cells": _cells(1),
    "#size-cells": _cells(0),
}
"""All properties of /ibm,persistent-memory; it is there even without any DIMM."""


def expected_connectors(slots: int) -> tuple[Connector, ...]:
    """The PMEM DRCs of the root: one a slot, whether it is taken or not.

    QEMU spapr.c:spapr_create_nvdimm_dr_connectors, spapr_drc.c:spapr_dt_drc; the power domain -1
    is "none".
    """
    return tuple(Connector(drc_index(n), 0xFFFFFFFF, f"PMEM {n}", "PMEM") for n in range(slots))


def property_differences(
    expected: Mapping[str, bytes], found: Mapping[str, bytes], *, ignored: Sequence[str] = ()
) -> list[str]:
    """List the missing, wrong and unexpected properties of a node, each in a few words.

    Args:
        ignored: properties of which nothing is said. A node has a "phandle" or not, and it is
            parse() that looks at it.
    """
    said = []
    for name in sorted({*expected, *found} - {*ignored, "phandle"}):
        wanted, value = expected.get(name), found.get(name)
        if value is None:
            said.append(f"{name} is missing")
        elif wanted is None:
            said.append(f"{name} is there, which was not asked for: {_shown(value)}")
        elif wanted != value:
            said.append(f"{name} is {_shown(value)}, expected {_shown(wanted)}")
    return said


def judge_persistent_memory(
    tree: DeviceTree, *, slots: int, nvdimms: Mapping[int, Mapping[str, bytes]]
) -> list[str]:
    """List the errors of a tree's persistent memory; empty if there are none.

    Args:
        slots: how many memory slots the machine has.
        nvdimms: the properties that each DIMM's node must have, by DRC index.
    """
    said = [
        f"{tree.parent.path}: {word}"
        for word in property_differences(PARENT, tree.parent.properties)
    ]
    found = tree.nvdimms
    for drc in sorted({*nvdimms, *found}):
        if drc not in found:
            said.append(f"{NODE}@{drc:x} is missing")
        elif drc not in nvdimms:
            said.append(f"{found[drc].path} is there, which was not asked for")
        else:
            words = property_differences(nvdimms[drc], found[drc].properties)
            said += [f"{found[drc].path}: {word}" for word in words]
    announced = sorted(
        (c for c in tree.connectors if c.kind == "PMEM" or c.index >> 28 == DRC_TYPE_PMEM),
        key=lambda connector: connector.index,
    )
    if announced != list(expected_connectors(slots)):
        said.append(f"the root announces {announced} for {slots} slots")
    return said


def _shown(value: bytes) -> str:
    return value.hex(" ", -4) if value else "empty"
