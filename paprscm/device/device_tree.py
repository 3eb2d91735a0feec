# SPDX-License-Identifier: GPL-2.0-or-later
"""The device tree that QEMU passes to a guest, and its required nodes of persistent memory."""

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
    """One node: path and properties; a getter raises ContractError for a malformed property."""

    path: str
    properties: Mapping[str, bytes]

    def cells(self, name: str) -> tuple[int, ...]:
        """A property as 32-bit numbers."""
        value = self._value(name)
        if len(value) % 4:
            raise ContractError(
                f"{self.path}: {name} has {len(value)} bytes, which is not a multiple of 4"
            )
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
    """A device tree: its nodes by path; "/" is the root."""

    nodes: Mapping[str, TreeNode]

    def node(self, path: str) -> TreeNode:
        """The node with this path.

        Raises:
            ContractError: no such node.
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
            ContractError: a node below /ibm,persistent-memory is not a DIMM.
        """
        nvdimms: dict[int, TreeNode] = {}
        start = f"{self.parent.path}/"
        for path, node in self.nodes.items():
            if not path.startswith(start):
                continue
            name = re.fullmatch(rf"{NODE}@([1-9a-f][0-9a-f]*)", path.removeprefix(start))
            if name is None:
                raise ContractError(f"{path} is not the name of a persistent memory node")
            nvdimms[int(name[1], 16)] = node
        return nvdimms

    @property
    def connectors(self) -> tuple[Connector, ...]:
        """The DRCs that the root announces, of all types.

        Raises:
            ContractError: the four lists differ in length, or from their length fields.
        """
        root = self.node("/")
        numbers = [root.cells(name) for name in ("ibm,drc-indexes", "ibm,drc-power-domains")]
        texts = [root.strings(name, offset=4) for name in ("ibm,drc-names", "ibm,drc-types")]
        declared = [cells[0] for cells in numbers if cells]
        declared += [_first(root.properties[name]) for name in ("ibm,drc-names", "ibm,drc-types")]
        present = [len(cells) - 1 for cells in numbers] + [len(strings) for strings in texts]
        if declared != present or len(set(declared)) != 1:
            raise ContractError(
                f"the lists ibm,drc-* of the root have the length fields {declared}, "
                f"but {present} entries"
            )
        rows = zip(numbers[0][1:], numbers[1][1:], *texts, strict=True)
        return tuple(Connector(*row) for row in rows)


def parse_tree(blob: bytes) -> DeviceTree:
    """Parse a flattened device tree; the bytes after structure and strings are padding.

    Raises:
        ContractError: the blob is invalid (Devicetree Specification 0.4, chapter 5), or two nodes
            have the same phandle.
    """
    _check_header(blob)
    try:
        dtb = fdt.parse_dtb(blob)
    except Exception as error:  # the library has no exception class of its own
        raise ContractError(f"the device tree cannot be read: {error}") from error
    if dtb.root is None:
        raise ContractError("the device tree has no root")
    nodes = dict(_walk(dtb.root, "/"))
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
        raise ContractError(
            f"the device tree's header has size {total}, the blob {len(blob)} bytes"
        )
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
    """The bytes of a property, whose type the library has guessed."""
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
        driver: "spapr-nvdimm", or "nvdimm", which never needs it.
        pmem, pmem_override: property of the backend, and of the device.
    """
    return driver == "spapr-nvdimm" and (not pmem or pmem_override)


def associativity(node: int) -> tuple[int, ...]:
    """ibm,associativity of a resource in a NUMA node, of a machine without -numa dist.

    Before CAS the form is 1: a length, three domains, and the node's number as primary domain. The
    distance of any two nodes is then 20, which for Linux (arch/powerpc/mm/numa.c, __node_distance)
    means that they share every domain but the primary one; those of node 0 are all 0 (LoPAR,
    "Form 1"; QEMU hw/ppc/spapr_numa.c).
    """
    return (4, 0, 0, 0, node)


def distance(first: Sequence[int], second: Sequence[int]) -> int:
    """NUMA distance that Linux computes from two ibm,associativity of form 1; 10: the same node.

    Linux arch/powerpc/mm/numa.c (__node_distance): the distance doubles for each reference point
    at which they differ, from the primary one (4) on; QEMU's reference points are 4, 3, 2, 1.
    """
    result = 10
    for level in (4, 3, 2, 1):
        if first[level] == second[level]:
            break
        result *= 2
    return result


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
    """The exact properties of a DIMM's node (QEMU spapr_nvdimm.c:spapr_dt_nvdimm).

    Args:
        slot: its memory slot.
        driver, pmem, pmem_override, uuid, label_bytes: as on the command line.
        size_bytes: usable size, without the label area.
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
"""The exact properties of /ibm,persistent-memory, which exists even without any DIMM."""


def expected_connectors(slots: int) -> tuple[Connector, ...]:
    """The PMEM DRCs of the root: one for each slot, used or not.

    QEMU spapr.c:spapr_create_nvdimm_dr_connectors, spapr_drc.c:spapr_dt_drc; power domain -1 means
    "none".
    """
    return tuple(Connector(drc_index(n), 0xFFFFFFFF, f"PMEM {n}", "PMEM") for n in range(slots))


def property_differences(
    expected: Mapping[str, bytes], found: Mapping[str, bytes], *, ignored: Sequence[str] = ()
) -> list[str]:
    """List the missing, wrong and unexpected properties of a node, each in a few words.

    Args:
        expected, found: properties by name.
        ignored: properties to skip, in addition to "phandle", which is optional and checked by
            parse_tree().
    """
    differences = []
    for name in sorted({*expected, *found} - {*ignored, "phandle"}):
        expected_value, value = expected.get(name), found.get(name)
        if value is None:
            differences.append(f"{name} is missing")
        elif expected_value is None:
            differences.append(f"{name} is unexpected: {_hex(value)}")
        elif expected_value != value:
            differences.append(f"{name} is {_hex(value)}, expected {_hex(expected_value)}")
    return differences


def judge_persistent_memory(
    tree: DeviceTree, *, slots: int, nvdimms: Mapping[int, Mapping[str, bytes]]
) -> list[str]:
    """List the errors of a tree's persistent memory; empty if there are none.

    Args:
        tree: the device tree.
        slots: number of memory slots of the machine.
        nvdimms: expected properties of each DIMM's node, by DRC index.
    """
    errors = [
        f"{tree.parent.path}: {word}"
        for word in property_differences(PARENT, tree.parent.properties)
    ]
    nodes = tree.nvdimms
    for drc in sorted({*nvdimms, *nodes}):
        if drc not in nodes:
            errors.append(f"{NODE}@{drc:x} is missing")
        elif drc not in nvdimms:
            errors.append(f"{nodes[drc].path} is unexpected")
        else:
            words = property_differences(nvdimms[drc], nodes[drc].properties)
            errors += [f"{nodes[drc].path}: {word}" for word in words]
    announced = sorted(
        (c for c in tree.connectors if c.kind == "PMEM" or c.index >> 28 == DRC_TYPE_PMEM),
        key=lambda connector: connector.index,
    )
    if announced != list(expected_connectors(slots)):
        errors.append(f"the root announces {announced} for {slots} slots")
    return errors


def _hex(value: bytes) -> str:
    return value.hex(" ", -4) if value else "empty"
