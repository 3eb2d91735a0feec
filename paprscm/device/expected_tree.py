# SPDX-License-Identifier: GPL-2.0-or-later
"""The nodes of persistent memory that a guest's device tree must have (PAPR; hw/ppc in QEMU)."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from paprscm.device.device_tree import Connector, DeviceTree
from paprscm.papr import DRC_TYPE_PMEM, NODE, PARENT_NODE, SCM_BLOCK_SIZE, Property, drc_index


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
