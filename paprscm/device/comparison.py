# SPDX-License-Identifier: GPL-2.0-or-later
"""Judge what QEMU made of a machine: refused with the reason, or made as the command line said."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paprscm.device.command_line import RawMachine
from paprscm.device.device_tree import (
    DeviceTree,
    associativity,
    expected_node,
    judge_persistent_memory,
    parse_tree,
)
from paprscm.device.launch import Attempt
from paprscm.device.prediction import PlacedDimm, Prediction
from paprscm.log import quoted
from paprscm.papr import drc_index

# What QEMU may say of a machine that it takes: of pmem=on for a file that is none.
_HARMLESS = re.compile(
    r"[Ww]arning: (requesting persistence across crashes for backend file .* failed\."
    r"|Using non DAX backing file with 'pmem=on' option is deprecated)"
)
_ASKED = ("uuid", "label-size", "unarmed")


def monitor_commands(machine: RawMachine) -> list[tuple[str, Mapping[str, Any]]]:
    """The QMP commands whose answers judge() wants."""
    asked: list[tuple[str, Mapping[str, Any]]] = [("query-memory-devices", {})]
    asked += [
        ("qom-get", {"path": f"/machine/peripheral/nv{number}", "property": name})
        for number in range(len(machine.dimms))
        for name in _ASKED
    ]
    return asked


def judge_attempt(machine: RawMachine, prediction: Prediction, found: Attempt) -> str | None:
    """Compare an attempt with its prediction: the difference in one paragraph, or None.

    Args:
        found: with the answers to questions().

    Raises:
        ContractError: the tree, or an answer, cannot be read.
    """
    if prediction.reasons:
        if found.refused:
            return None
        wanted = " or ".join(sorted(reason.name for reason in prediction.reasons))
        return f"it must be refused ({wanted}), and was: {found}"
    if not found.accepted:
        return f"it must be accepted, and was not: {found}"
    said = [*_accepted(machine, prediction.placed, found)]
    return "it came out wrong:\n" + quoted("\n".join(said)) if said else None


def unusual_messages(prediction: Prediction, found: Attempt) -> str | None:
    """Messages, not seen so far, about a machine that QEMU treats as predicted.

    No contract fixes the words, nor which of several reasons is given.
    """
    if prediction.reasons:
        if any(reason.is_in(found.text) for reason in prediction.reasons):
            return None
        wanted = " or ".join(sorted(reason.name for reason in prediction.reasons))
        return f"a refusal ({wanted}) in other words:\n{quoted(found.text)}"
    strange = [line for line in found.text.splitlines() if not _HARMLESS.search(line)]
    return "accepted with a message:\n" + quoted("\n".join(strange)) if strange else None


def _accepted(machine: RawMachine, placed: Sequence[PlacedDimm], found: Attempt) -> Iterator[str]:
    """Check the device tree and the monitor's answers of an accepted machine."""
    tree = parse_tree(found.tree or b"")
    nodes = {}
    for dimm, place in zip(machine.dimms, placed, strict=True):
        nodes[drc_index(place.slot)] = expected_node(
            slot=place.slot,
            driver=dimm.driver,
            pmem=machine.backends[dimm.memdev or 0].pmem,
            pmem_override=dimm.pmem_override,
            uuid=dimm.uuid or "",
            label_bytes=dimm.label_bytes or 0,
            size_bytes=place.size_bytes,
            associativity=associativity(dimm.node or 0),
        )
    yield from judge_persistent_memory(tree, slots=machine.slots or 0, nvdimms=nodes)
    yield from numa_differences(tree)
    yield from _monitor(machine, placed, found)


def numa_differences(tree: DeviceTree) -> Iterator[str]:
    """Each DIMM is in the same place as the memory of its node, where that has some."""
    memories = {
        node.cells("ibm,associativity")[-1]: node
        for path, node in tree.nodes.items()
        if re.fullmatch(r"/memory@[0-9a-f]+", path)
    }
    for node in tree.nvdimms.values():
        cells = node.cells("ibm,associativity")
        memory = memories.get(cells[-1])
        if memory is not None and memory.cells("ibm,associativity") != cells:
            yield f"{node.path} and {memory.path}, of one NUMA node, differ in ibm,associativity"


def _monitor(machine: RawMachine, placed: Sequence[PlacedDimm], found: Attempt) -> Iterator[str]:
    """query-memory-devices and qom-get say what the command line did."""
    devices = {item["data"]["id"]: item for item in found.returned(0)}
    if len(devices) != len(machine.dimms):
        yield f"query-memory-devices lists {sorted(devices)}"
    for number, (dimm, place) in enumerate(zip(machine.dimms, placed, strict=True)):
        expected = {
            "type": "nvdimm",
            "addr": place.addr,
            "hotpluggable": True,
            "hotplugged": False,
            "id": f"nv{number}",
            "memdev": f"/objects/mem{dimm.memdev}",
            "node": dimm.node or 0,
            "size": place.size_bytes,
            "slot": place.slot,
            "uuid": (dimm.uuid or "").lower(),
            "label-size": dimm.label_bytes,
            "unarmed": dimm.unarmed,
        }
        item = devices.get(f"nv{number}", {"type": None, "data": {}})
        told = {"type": item["type"], **item["data"]}
        for offset, name in enumerate(_ASKED):
            told[name] = found.returned(1 + len(_ASKED) * number + offset)
        for name in sorted({*expected, *told}):
            if expected.get(name) != told.get(name):
                yield f"nv{number}: {name} is {told.get(name)}, expected {expected.get(name)}"
