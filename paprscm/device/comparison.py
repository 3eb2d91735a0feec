# SPDX-License-Identifier: GPL-2.0-or-later
"""Judge QEMU's result for a command line: refused for a predicted reason, or accepted as given."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paprscm.device.command_line import RawMachine
from paprscm.device.device_tree import DeviceTree, parse_tree
from paprscm.device.expected_tree import associativity, expected_node, judge_persistent_memory
from paprscm.device.launch import Attempt
from paprscm.device.prediction import PlacedDimm, Prediction
from paprscm.log import quoted
from paprscm.papr import drc_index

# Permitted messages about an accepted machine: pmem=on with a file that is not on pmem.
_HARMLESS = re.compile(
    r"[Ww]arning: (requesting persistence across crashes for backend file .* failed\."
    r"|Using non DAX backing file with 'pmem=on' option is deprecated)"
)
_PROPERTIES = ("uuid", "label-size", "unarmed")


def monitor_commands(machine: RawMachine) -> list[tuple[str, Mapping[str, Any]]]:
    """The QMP commands whose answers judge_attempt() needs."""
    commands: list[tuple[str, Mapping[str, Any]]] = [("query-memory-devices", {})]
    commands += [
        ("qom-get", {"path": f"/machine/peripheral/nv{number}", "property": name})
        for number in range(len(machine.dimms))
        for name in _PROPERTIES
    ]
    return commands


def judge_attempt(machine: RawMachine, prediction: Prediction, attempt: Attempt) -> str | None:
    """Compare an attempt with its prediction; return the difference, or None.

    Args:
        machine: the command line.
        prediction: the expected result.
        attempt: the attempt, with the answers to monitor_commands().

    Raises:
        ContractError: the device tree or an answer cannot be parsed.
    """
    if prediction.reasons:
        if attempt.refused:
            return None
        names = " or ".join(sorted(reason.name for reason in prediction.reasons))
        return f"must be refused ({names}), but was: {attempt}"
    if not attempt.accepted:
        return f"must be accepted, but was not: {attempt}"
    differences = [*_accepted(machine, prediction.placed, attempt)]
    return (
        "device tree or monitor differs from the command line:\n" + quoted("\n".join(differences))
        if differences
        else None
    )


def unusual_messages(prediction: Prediction, attempt: Attempt) -> str | None:
    """New messages about a machine that QEMU treats as predicted, or None.

    No contract fixes the words, nor which of several reasons QEMU names.
    """
    if prediction.reasons:
        if any(reason.is_in(attempt.text) for reason in prediction.reasons):
            return None
        names = " or ".join(sorted(reason.name for reason in prediction.reasons))
        return f"refused ({names}) with another message:\n{quoted(attempt.text)}"
    strange = [line for line in attempt.text.splitlines() if not _HARMLESS.search(line)]
    return "accepted with a message:\n" + quoted("\n".join(strange)) if strange else None


def _accepted(machine: RawMachine, placed: Sequence[PlacedDimm], attempt: Attempt) -> Iterator[str]:
    """Check the device tree and the monitor's answers of an accepted machine."""
    tree = parse_tree(attempt.tree or b"")
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
    yield from _monitor(machine, placed, attempt)


def numa_differences(tree: DeviceTree) -> Iterator[str]:
    """DIMMs whose ibm,associativity differs from that of their node's memory."""
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


def _monitor(machine: RawMachine, placed: Sequence[PlacedDimm], attempt: Attempt) -> Iterator[str]:
    """Differences of query-memory-devices and qom-get from the command line."""
    devices = {item["data"]["id"]: item for item in attempt.returned(0)}
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
        reported = {"type": item["type"], **item["data"]}
        for offset, name in enumerate(_PROPERTIES):
            reported[name] = attempt.returned(1 + len(_PROPERTIES) * number + offset)
        for name in sorted({*expected, *reported}):
            if expected.get(name) != reported.get(name):
                yield f"nv{number}: {name} is {reported.get(name)}, expected {expected.get(name)}"
