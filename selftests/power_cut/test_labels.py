# SPDX-License-Identifier: GPL-2.0-or-later
"""Legal sizes of namespaces, and the order of writes to a label area."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from paprscm.power_cut.images import Image
from paprscm.power_cut.labels import MOST, LabelArea, Namespaces, changes
from paprscm.power_cut.store_log import PAGE
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import MIB

# Steps: 1 sets the size of "a", 2 flushes, 3 that of "b", 4 flushes, 5 destroys "a".
NAMESPACES = Namespaces({"a": [(1, 32), (5, 0)], "b": [(3, 64)]}, flushes=[2, 4])


@pytest.mark.parametrize(
    ("done", "legal"),
    [
        (0, {"a": [0], "b": [0]}),
        (1, {"a": [0, 32], "b": [0]}),
        (2, {"a": [0, 32], "b": [0]}),
        (3, {"a": [32], "b": [0, 64]}),
        (4, {"a": [32], "b": [0, 64]}),
        (5, {"a": [32, 0], "b": [64]}),
        (6, {"a": [32, 0], "b": [64]}),
    ],
)
def test_a_flush_makes_a_change_durable(done: int, legal: dict[str, list[int]]) -> None:
    assert NAMESPACES.legal(done) == legal


def test_differences_name_the_namespace() -> None:
    assert NAMESPACES.differences({"a": 32}, 3) == {}
    assert NAMESPACES.differences({"b": 64}, 3) == {"a": "has 0 bytes, not 32"}
    assert NAMESPACES.differences({"a": 32, "b": 64, "c": 1}, 6) == {"c": "exists"}
    assert NAMESPACES.differences({"a": 32}, 4) == {}
    assert NAMESPACES.differences({"a": 32}, 4, synced=True) == {"b": "has 0 bytes, not 64"}


def test_changes_are_possible() -> None:
    sizes: dict[str, int] = {}
    for change in changes(random.Random(1), 200):  # noqa: S311
        assert change.is_new == (change.uuid not in sizes)
        assert change.is_new or change.size < sizes[change.uuid]
        sizes[change.uuid] = change.size
        sizes = {uuid: size for uuid, size in sizes.items() if size}
        assert len(sizes) <= MOST


def test_a_lie_can_be_seen() -> None:
    """In each sequence a namespace is there while another one changes."""
    for seed in range(3000):
        sizes: dict[str, int] = {}
        others = 0
        for change in changes(random.Random(seed), 3):  # noqa: S311
            others = len(sizes.keys() - {change.uuid})
            sizes[change.uuid] = change.size
        assert others, seed


def area(index: bytes, label: bytes) -> Image:
    """An image of a DIMM whose labels begin in the second page of the label area."""
    head = bytes(48) + PAGE.to_bytes(8, "little")
    first = SMALL // PAGE
    return Image("", {(1, first): (head + index).ljust(PAGE), (1, first + 1): label.ljust(PAGE)})


@pytest.mark.parametrize(
    ("index", "label", "expected"),
    [
        (b"old", b"old", True),
        (b"old", b"new", True),
        (b"new", b"new", True),
        (b"new", b"old", False),
    ],
)
def test_an_index_before_its_label_is_not_in_order(
    index: bytes, label: bytes, expected: bool
) -> None:
    dimm = replace(PMEM_OFF.at(1, SMALL), label_bytes=2 * MIB)
    old, new = area(b"old", b"old"), area(b"new", b"new")
    assert LabelArea(dimm).is_in_order(area(index, label), old, new) is expected
