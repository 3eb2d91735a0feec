# SPDX-License-Identifier: GPL-2.0-or-later
"""Parser of device trees, and model of machines, on cases with known results."""

import re
import struct
from dataclasses import replace
from typing import Any

import fdt
import pytest

from paprscm.device.command_line import RawBackend, RawDimm, RawMachine
from paprscm.device.comparison import judge_attempt, unusual_messages
from paprscm.device.device_tree import Connector, DeviceTree, parse_tree
from paprscm.device.expected_tree import (
    PARENT,
    associativity,
    distance,
    expected_connectors,
    expected_node,
    judge_persistent_memory,
    property_differences,
)
from paprscm.device.launch import Attempt
from paprscm.device.prediction import predict
from paprscm.device.refusals import RefusalReason
from paprscm.device.strategies import FLAWS
from paprscm.errors import ContractError
from paprscm.vm.machine import GIB, MIB

UUID = "6f1c7a52-3a0e-4b43-9a1f-5a7e61f0c9d4"
LABEL = 128 << 10
BLOCK = 256 * MIB
PLAIN = RawBackend(size_bytes=BLOCK + LABEL)
RIGHT = RawMachine(
    memory_bytes=GIB,
    slots=4,
    maxmem_bytes=4 * GIB,
    backends=(PLAIN, PLAIN),
    dimms=(RawDimm(uuid=UUID), RawDimm(memdev=1, uuid=UUID)),
)


def node_of(**changes: Any) -> dict[str, bytes]:
    values: dict[str, Any] = {
        "slot": 1,
        "driver": "spapr-nvdimm",
        "pmem": False,
        "pmem_override": False,
        "uuid": UUID.upper(),
        "label_bytes": LABEL,
        "size_bytes": 2 * BLOCK,
        "associativity": associativity(3),
    }
    return expected_node(**{**values, **changes})


def lists(connectors: tuple[Connector, ...]) -> dict[str, bytes]:
    """The four ibm,drc-* properties of a node."""
    count = struct.pack(">I", len(connectors))
    return {
        "ibm,drc-indexes": count + b"".join(struct.pack(">I", c.index) for c in connectors),
        "ibm,drc-power-domains": count
        + b"".join(struct.pack(">I", c.power_domain) for c in connectors),
        "ibm,drc-names": count + b"".join(c.name.encode() + b"\0" for c in connectors),
        "ibm,drc-types": count + b"".join(c.kind.encode() + b"\0" for c in connectors),
    }


def blob_of(nodes: dict[str, dict[str, bytes]], *, padding: int = 4096) -> bytes:
    """A blob like QEMU's, with padding at its end."""
    tree = fdt.FDT()
    tree.header.version = 17
    for path, properties in nodes.items():
        # This also creates the parent nodes.
        tree.set_property("new", 0, path)
        node = tree.get_node(path)
        node.remove_property("new")
        for name, value in properties.items():
            node.append(fdt.items.new_property(name, value))
    blob = bytearray(tree.to_dtb(17)) + bytes(padding)
    struct.pack_into(">I", blob, 4, len(blob))
    return bytes(blob)


LMB = Connector(0x80000004, 0xFFFFFFFF, "LMB 4", "LMB")
GOOD = {
    "/": lists((LMB, *expected_connectors(2))),
    "/ibm,persistent-memory": dict(PARENT),
    "/ibm,persistent-memory/ibm,pmemory@90000001": node_of(),
}


def test_a_good_tree_has_no_differences() -> None:
    tree = parse_tree(blob_of(GOOD))
    assert list(tree.nvdimms) == [0x90000001]
    assert tree.connectors[0] == LMB
    assert judge_persistent_memory(tree, slots=2, nvdimms={0x90000001: node_of()}) == []


def test_values_are_unchanged() -> None:
    values = {
        "empty": b"",
        "text": b"a\0",
        "texts": b"a\0bc\0",
        "nul": b"\0",
        "odd": b"\1\2\3",
        "cells": struct.pack(">2I", 1, 1 << 31),
        "unended": b"abcde",
        "zeros": bytes(8),
        "newline": b"a\n\0",
    }
    node = parse_tree(blob_of({"/": values})).node("/")
    assert dict(node.properties) == values
    assert node.strings("texts") == ("a", "bc")
    assert node.cells("cells") == (1, 1 << 31)
    for name, read in (("odd", node.cells), ("cells", node.cell), ("unended", node.strings)):
        with pytest.raises(ContractError, match=f"/: {name}"):
            read(name)
    with pytest.raises(ContractError, match="/ has no absent"):
        node.cell("absent")


def changed(offset: int, value: int) -> bytes:
    blob = bytearray(blob_of(GOOD))
    struct.pack_into(">I", blob, offset, value)
    return bytes(blob)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "has no header"),
        (blob_of(GOOD)[:39], "has no header"),
        (changed(0, 0xFEEDD00D), "begins with 0xfeedd00d"),
        (changed(4, 1 << 20), "header has size 1048576"),
        (blob_of(GOOD)[:-1], "header has size"),
        (blob_of(GOOD) + b"\0", "header has size"),
        (changed(8, 1 << 20), "structure block goes beyond"),
        (changed(12, 1 << 20), "strings block goes beyond"),
        (changed(32, 1 << 20), "strings block goes beyond"),
        (changed(36, 1 << 20), "structure block goes beyond"),
        (changed(36, 8), "does not end with FDT_END"),
        (changed(16, 1 << 20), "cannot be read"),
    ],
)
def test_a_broken_blob_is_named(blob: bytes, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        parse_tree(blob)


def test_a_property_that_is_too_long_is_named() -> None:
    blob = bytearray(blob_of({"/": {"a": b"x" * 5}}))
    at = struct.unpack_from(">I", blob, 8)[0] + 8
    assert struct.unpack_from(">2I", blob, at) == (3, 5)
    for length in (1 << 20, 0xFFFFFFFF, 30):
        struct.pack_into(">I", blob, at + 4, length)
        with pytest.raises(ContractError, match="cannot be read"):
            parse_tree(bytes(blob))


def test_two_nodes_with_one_phandle() -> None:
    one = {"phandle": struct.pack(">I", 7)}
    with pytest.raises(ContractError, match="phandle 7"):
        parse_tree(blob_of({"/": one, "/other": one}))


@pytest.mark.parametrize("name", sorted(node_of()))
def test_each_property_counts(name: str) -> None:
    right = node_of()
    (longer,) = property_differences(right, {**right, name: right[name] + b"\1"})
    assert longer.startswith(f"{name} is ") and ", expected " in longer
    dropped = {key: value for key, value in right.items() if key != name}
    assert property_differences(right, dropped) == [f"{name} is missing"]
    assert property_differences(dropped, right)[0].startswith(f"{name} is unexpected")
    assert property_differences(right, {**right, "phandle": b"\0\0\0\1"}) == []


@pytest.mark.parametrize(
    ("changes", "present"),
    [
        ({}, True),
        ({"pmem": True}, False),
        ({"pmem": True, "pmem_override": True}, True),
        ({"pmem_override": True}, True),
        ({"driver": "nvdimm"}, False),
        ({"driver": "nvdimm", "pmem": True}, False),
    ],
)
def test_kinds_that_require_flushes(changes: dict[str, object], present: bool) -> None:
    assert ("ibm,hcall-flush-required" in node_of(**changes)) == present


def test_the_expected_node() -> None:
    node = node_of()
    assert node["reg"] == node["ibm,my-drc-index"] == bytes.fromhex("90000001")
    assert node["ibm,unit-guid"] == UUID.encode() + b"\0"
    assert node["ibm,number-of-blocks"] == bytes(7) + b"\2"
    assert node["ibm,metadata-size"] == b"\0\2\0\0"
    assert node["ibm,associativity"] == struct.pack(">5I", 4, 0, 0, 0, 3)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({"/ibm,persistent-memory/ibm,pmemory@90000001": {}}, "ibm,metadata-size is missing"),
        ({"/ibm,persistent-memory/ibm,pmemory@90000000": node_of()}, "is unexpected"),
        ({"/": lists(expected_connectors(3))}, "for 2 slots"),
        ({"/": lists((*expected_connectors(2), replace(LMB, kind="PMEM")))}, "for 2 slots"),
        ({"/": lists((*expected_connectors(2), replace(LMB, index=0x90000007)))}, "for 2 slots"),
        ({"/ibm,persistent-memory": {**PARENT, "#size-cells": b"\0\0\0\1"}}, "#size-cells is"),
    ],
)
def test_a_wrong_tree_is_named(nodes: dict[str, dict[str, bytes]], message: str) -> None:
    tree = DeviceTree(parse_tree(blob_of({**GOOD, **nodes})).nodes)
    messages = judge_persistent_memory(tree, slots=2, nvdimms={0x90000001: node_of()})
    assert any(message in word for word in messages), messages


def test_a_missing_node_is_named() -> None:
    tree = parse_tree(blob_of({path: GOOD[path] for path in list(GOOD)[:2]}))
    messages = judge_persistent_memory(tree, slots=2, nvdimms={0x90000001: node_of()})
    assert messages == ["ibm,pmemory@90000001 is missing"]
    with pytest.raises(ContractError, match="has no /ibm,persistent-memory"):
        parse_tree(blob_of({"/": GOOD["/"]})).nvdimms  # noqa: B018


@pytest.mark.parametrize("name", ["memory@90000000", "ibm,pmemory", "ibm,pmemory@9000000G"])
def test_a_strange_child_is_named(name: str) -> None:
    tree = parse_tree(blob_of({**GOOD, f"/ibm,persistent-memory/{name}": node_of()}))
    with pytest.raises(ContractError, match="not the name of a persistent memory node"):
        tree.nvdimms  # noqa: B018


def test_lists_of_different_lengths_are_named() -> None:
    shorter = {**GOOD["/"], "ibm,drc-names": lists(expected_connectors(2))["ibm,drc-names"]}
    with pytest.raises(ContractError, match=r"ibm,drc-\* of the root"):
        parse_tree(blob_of({**GOOD, "/": shorter})).connectors  # noqa: B018


@pytest.mark.parametrize(
    ("domains", "away"),
    [((0, 0, 0), 20), ((0, 0, 1), 40), ((0, 1, 1), 80), ((1, 1, 1), 160), ((1, 0, 1), 40)],
)
def test_distance_as_in_linux(domains: tuple[int, ...], away: int) -> None:
    assert distance((4, 0, 0, 0, 0), (4, *domains, 1)) == away
    assert distance((4, *domains, 1), (4, *domains, 1)) == 10


def dimm(number: int = 0, **changes: object) -> RawMachine:
    return RIGHT.with_dimm(number, **changes)


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (RIGHT, None),
        (RawMachine(), None),
        (replace(RIGHT, slots=33), "TOO_MANY_SLOTS"),
        (replace(RIGHT, slots=0), "NO_SLOTS"),
        (replace(RIGHT, slots=1), "NO_FREE_SLOT"),
        (replace(RIGHT, maxmem_bytes=GIB + BLOCK), "NO_SPACE"),
        (replace(RIGHT, maxmem_bytes=GIB + 2 * BLOCK), None),
        (replace(RIGHT, memory_bytes=GIB + MIB), "MEMORY_UNALIGNED"),
        (replace(RIGHT, nodes=(BLOCK, 3 * BLOCK)), None),
        (replace(RIGHT, nodes=(BLOCK, BLOCK)), "NODES_ARE_NOT_MEMORY"),
        (replace(RIGHT, nodes=(BLOCK - MIB, 3 * BLOCK + MIB)), "NODE_UNALIGNED"),
        (replace(RIGHT, nodes=(0, 64 * MIB, GIB - 64 * MIB)), "MEMORY_TOO_SMALL"),
        (RIGHT.with_backend(1, size_bytes=0), "BACKEND_SIZE"),
        (RIGHT.with_backend(1, readonly=True), "ARMED_READONLY"),
        (RIGHT.with_backend(1, kind="ram"), "NO_FILE"),
        (RIGHT.with_backend(1, kind="ram").with_dimm(1, driver="nvdimm"), None),
        (dimm(label_bytes=LABEL - 1), "LABEL_TOO_SMALL"),
        (dimm(label_bytes=LABEL + 1), "NOT_IN_BLOCKS"),
        (dimm(label_bytes=BLOCK + LABEL), "LABEL_TOO_BIG"),
        (dimm(label_bytes=LABEL - 1, memdev=None), "LABEL_TOO_SMALL"),
        (dimm(uuid=UUID[:-1]), "UUID_MALFORMED"),
        (dimm(uuid=None, label_bytes=None), "NOT_IN_BLOCKS or NO_LABEL or NO_UUID"),
        (dimm(slot=4), "SLOT_OUT_OF_RANGE"),
        (dimm(slot=-1), None),
        (dimm(number=1, slot=0), "SLOT_BUSY"),
        (dimm(slot=0), None),
        (dimm(node=1), "NODE_OUT_OF_RANGE"),
        (dimm(driver="nvdimm", pmem_override=True), "OVERRIDE_UNKNOWN"),
        (dimm(number=1, memdev=0), "MEMDEV_BUSY"),
        (dimm(addr=GIB), None),
        (dimm(addr=GIB + 1), "ADDR_UNALIGNED"),
        (dimm(addr=GIB - BLOCK), "ADDR_OUTSIDE"),
        (dimm(addr=4 * GIB - BLOCK), None),
        (dimm(addr=4 * GIB), "ADDR_OUTSIDE"),
        (dimm(number=1, addr=GIB), "ADDR_CONFLICT"),
        (dimm(number=1, addr=GIB + BLOCK), None),
    ],
)
def test_predicted_refusals(machine: RawMachine, reason: str | None) -> None:
    names = sorted(found.name for found in predict(machine).reasons)
    assert (" or ".join(names) or None) == reason


def test_predicted_slots_and_addresses() -> None:
    machine = RIGHT.with_dimm(0, slot=0, addr=GIB + 2 * BLOCK)
    assert [(p.slot, p.addr) for p in predict(machine).placed] == [(0, GIB + 2 * BLOCK), (1, GIB)]
    around = machine.with_dimm(0, addr=GIB)
    assert [p.addr for p in predict(around).placed] == [GIB, GIB + BLOCK]


def test_the_command_line() -> None:
    machine = replace(RIGHT, nodes=(BLOCK, 3 * BLOCK), nvdimm=False, distances=((0, 1, 40),))
    machine = machine.with_dimm(0, addr=GIB, unarmed=True).with_backend(0, readonly=True)
    words = machine.words()
    assert words[:2] == ["-m", "size=1024M,slots=4,maxmem=4096M"]
    assert "memory-backend-ram,id=ram0,size=256M" in words
    assert "dist,src=0,dst=1,val=40" in words
    assert "memory-backend-file,id=mem0,size=262272K,mem-path=file0,share=on,readonly=on" in words
    device = f"label-size=128K,uuid={UUID},addr=0x40000000,unarmed=on"
    assert f"spapr-nvdimm,id=nv0,memdev=mem0,{device}" in words
    assert machine.files() == {"file0": BLOCK + LABEL}
    script = machine.script(["qemu"])
    assert f"truncate -s {BLOCK + LABEL} file0 && qemu -machine pseries,nvdimm=off" in script


def refused(text: str, *, status: int = 1) -> Attempt:
    return Attempt(status=status, text=text, answers=(), tree=None, duration_s=0.1)


@pytest.mark.parametrize(
    ("machine", "found", "message"),
    [
        (dimm(slot=4), refused("-device …: invalid slot number 4, valid range is [0-3]"), None),
        (dimm(slot=4), refused("-device …: slot 1 is busy"), None),
        (dimm(slot=4), refused(""), "must be refused"),
        (dimm(slot=4), refused("invalid slot number 4, valid range is", status=-6), "SIGABRT"),
        (RIGHT, refused("no room"), "must be accepted"),
        (dimm(slot=4), Attempt(0, "", (), b"", 0.1), "must be refused"),
    ],
)
def test_attempts_are_judged(machine: RawMachine, found: Attempt, message: str | None) -> None:
    wrong = judge_attempt(machine, predict(machine), found)
    if message is None:
        assert wrong is None
    else:
        assert wrong is not None
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(wrong)


@pytest.mark.parametrize(
    ("machine", "found", "message"),
    [
        (dimm(slot=4), refused("-device …: invalid slot number 4, valid range is [0-3]"), None),
        (dimm(slot=4), refused("-device …: slot 1 is busy"), "SLOT_OUT_OF_RANGE.*\n +.*is busy"),
        (RIGHT, Attempt(0, "", (), b"", 0.1), None),
        (RIGHT, Attempt(0, "what?", (), b"", 0.1), "accepted with a message:\n +what"),
    ],
)
def test_other_messages_are_unusual(
    machine: RawMachine, found: Attempt, message: str | None
) -> None:
    other = unusual_messages(predict(machine), found)
    if message is None:
        assert other is None
    else:
        assert other is not None
        assert re.search(message, other)


def test_no_message_gives_two_reasons() -> None:
    texts = {
        RefusalReason.MEMORY_UNALIGNED: "Memory size 0x1 is not aligned to 256 MiB",
        RefusalReason.MAXMEM_UNALIGNED: "Maximum memory size 0x1 is not aligned to 256 MiB",
        RefusalReason.NO_FREE_SLOT: "-device x: no free slots available",
        RefusalReason.NO_SLOTS: "-device x: no slots where allocated, "
        "please specify the 'slots' option",
    }
    for reason, text in texts.items():
        assert [other for other in RefusalReason if other.is_in(text)] == [reason]


def test_every_reason_has_a_flaw() -> None:
    assert set(FLAWS) == {reason for reason in RefusalReason if reason.predicted}
