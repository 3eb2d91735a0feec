# SPDX-License-Identifier: GPL-2.0-or-later
"""Label areas with additional labels."""

from __future__ import annotations

import uuid

from paprscm.labels.metadata import INDEX, LABEL, LabelArea, StoredNamespace

INDEX_BYTES = 256
SLOTS = 4


def empty_area() -> LabelArea:
    """Two index blocks, the second one newer, and only free slots."""
    blocks = b""
    for sequence in (1, 2):
        block = b"NAMESPACE_INDEX\0".ljust(72, b"\0") + bytes([(1 << SLOTS) - 1])
        blocks += INDEX.changed(
            block.ljust(INDEX_BYTES, b"\0"), seq=sequence, nslot=SLOTS, mysize=INDEX_BYTES
        )
    return LabelArea.parse(blocks + bytes(256 * SLOTS))


def test_labels_fill_free_slots() -> None:
    area = empty_area()
    assert (area.current, area.used_slots()) == (1, [])
    labels = {
        slot: LABEL.changed(bytes(256), uuid=slot, slot=slot, dpa=slot << 24, rawsize=1 << 24)
        for slot in (1, 3)
    }
    filled = area.filled(labels)
    for number in (0, 1, None):
        assert filled.used_slots(number) == [1, 3]
        assert filled.namespaces(number) == {
            StoredNamespace(str(uuid.UUID(bytes=slot.to_bytes(16, "little"))), slot << 24, 1 << 24)
            for slot in (1, 3)
        }
    assert all(INDEX.is_intact(filled.index(number)) for number in (0, 1))
    assert filled.filled({0: labels[1]}).used_slots() == [0, 1, 3]
