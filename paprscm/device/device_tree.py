# SPDX-License-Identifier: GPL-2.0-or-later
"""The device tree that QEMU passes to a guest, read from its blob."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import fdt

from paprscm.errors import ContractError
from paprscm.papr import NODE, PARENT_NODE

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
