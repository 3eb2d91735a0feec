# SPDX-License-Identifier: GPL-2.0-or-later
"""What is stored on a DIMM about its namespaces: label area, and the information blocks.

A label area has two index blocks, which are written in turn, and then the slots of labels; an index
block has a bitmap of the free ones (UEFI, "NVDIMM Label Protocol"; Linux, drivers/nvdimm/label.h).
An information block is in a namespace's second page of 4 KiB (drivers/nvdimm/pfn.h and btt.h).
Values are little-endian; each structure has a Fletcher checksum.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

INFO_OFFSET: Final = 4096
"""Offset of an information block in its namespace, bytes."""
_SLOT_FREE: Final = 72
_INDEX_MAGIC: Final = b"NAMESPACE_INDEX\0"


@dataclass(frozen=True)
class Structure:
    """The layout of one structure.

    Attributes:
        name: for messages.
        checksum: offset of its checksum of 8 bytes.
        fields: offset and size of each of its other fields, bytes.
    """

    name: str
    checksum: int
    fields: Mapping[str, tuple[int, int]]

    def read(self, data: bytes, field: str) -> int:
        """The value of a field."""
        offset, size = self.fields[field]
        return int.from_bytes(data[offset : offset + size], "little")

    def changed(self, data: bytes, **values: int) -> bytes:
        """A copy with other values of fields, and with the checksum that belongs to it."""
        copy = bytearray(data)
        for field, value in values.items():
            offset, size = self.fields[field]
            copy[offset : offset + size] = value.to_bytes(size, "little")
        struct.pack_into("<Q", copy, self.checksum, 0)
        struct.pack_into("<Q", copy, self.checksum, fletcher64(copy))
        return bytes(copy)

    def is_intact(self, data: bytes) -> bool:
        """Whether the checksum belongs to the rest."""
        return self.changed(data) == data


INDEX: Final = Structure(
    "index block",
    64,
    {
        **{"labelsize": (19, 1), "seq": (20, 4), "myoff": (24, 8), "mysize": (32, 8)},
        **{"otheroff": (40, 8), "labeloff": (48, 8), "nslot": (56, 4)},
        **{"major": (60, 2), "minor": (62, 2)},
    },
)
LABEL: Final = Structure(
    "label",
    248,
    {
        **{"uuid": (0, 16), "flags": (80, 4), "nlabel": (84, 2), "position": (86, 2)},
        **{"isetcookie": (88, 8), "lbasize": (96, 8), "dpa": (104, 8), "rawsize": (112, 8)},
        **{"slot": (120, 4), "align": (124, 1)},
        **{"type_guid": (128, 16), "abstraction_guid": (144, 16)},
    },
)
_HEADER = {
    **{"uuid": (16, 16), "parent_uuid": (32, 16), "flags": (48, 4)},
    **{"version_major": (52, 2), "version_minor": (54, 2)},
}
PFN_INFO: Final = Structure(
    "pfn information block",
    4088,
    {
        **_HEADER,
        **{"dataoff": (56, 8), "npfns": (64, 8), "mode": (72, 4), "start_pad": (76, 4)},
        **{"end_trunc": (80, 4), "align": (84, 4), "page_size": (88, 4)},
        **{"page_struct_size": (92, 2)},
    },
)
BTT_INFO: Final = Structure(
    "BTT information block",
    4088,
    {
        **_HEADER,
        **{"external_lbasize": (56, 4), "external_nlba": (60, 4), "internal_lbasize": (64, 4)},
        **{"internal_nlba": (68, 4), "nfree": (72, 4), "infosize": (76, 4), "nextoff": (80, 8)},
        **{"dataoff": (88, 8), "mapoff": (96, 8), "logoff": (104, 8), "info2off": (112, 8)},
    },
)
LABEL_BYTES: Final = 256
"""Size of a label of version 1.2."""
INFO_BYTES: Final = 4096
"""Size of an information block."""


def fletcher64(data: bytes | bytearray) -> int:
    """The checksum of the structures: drivers/nvdimm/core.c, nd_fletcher64."""
    low = high = 0
    for (word,) in struct.iter_unpack("<I", data):
        low = (low + word) & 0xFFFFFFFF
        high = (high + low) & 0xFFFFFFFF
    return high << 32 | low


@dataclass(frozen=True)
class StoredNamespace:
    """A namespace of one label.

    Attributes:
        uuid: its own, which ndctl does not show; sysfs does.
        offset, size_bytes: its range in the region, bytes.
    """

    uuid: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class LabelArea:
    """A label area of version 1.2.

    Attributes:
        data: its content.
        index_bytes: size of one index block.
    """

    data: bytes
    index_bytes: int

    @classmethod
    def parse(cls, data: bytes) -> LabelArea:
        """Parse an area whose first index block is intact.

        Raises:
            ValueError: it is not.
        """
        if not data.startswith(_INDEX_MAGIC):
            raise ValueError("the area does not begin with an index block")
        size = INDEX.read(data, "mysize")
        if not 0 < size < len(data) // 2 or not INDEX.is_intact(data[:size]):
            raise ValueError("the area's first index block is damaged")
        return cls(data, size)

    def index(self, number: int) -> bytes:
        """Index block 0 or 1."""
        return self.data[number * self.index_bytes :][: self.index_bytes]

    @property
    def current(self) -> int | None:
        """The number of the index block that holds; None if both are damaged.

        Its sequence number, from 1 to 3, follows that of the other one.
        """
        intact = [number for number in (0, 1) if INDEX.is_intact(self.index(number))]
        if len(intact) < 2:
            return intact[0] if intact else None
        first, second = (INDEX.read(self.index(number), "seq") & 3 for number in (0, 1))
        return 1 if second == first % 3 + 1 else 0

    def slot_offset(self, slot: int) -> int:
        """Offset of a label in the area."""
        return 2 * self.index_bytes + slot * LABEL_BYTES

    def label(self, slot: int) -> bytes:
        """The label in a slot."""
        return self.data[self.slot_offset(slot) :][:LABEL_BYTES]

    def used_slots(self, number: int | None = None) -> list[int]:
        """Slots that an index block lists as used; None: the current one, if there is one."""
        number = self.current if number is None else number
        if number is None:
            return []
        index = self.index(number)
        free = int.from_bytes(index[_SLOT_FREE:], "little")
        return [slot for slot in range(INDEX.read(index, "nslot")) if not free >> slot & 1]

    def namespaces(self, number: int | None = None) -> frozenset[StoredNamespace]:
        """The namespaces of intact labels in used slots, as for used_slots()."""
        labels = (self.label(slot) for slot in self.used_slots(number))
        return frozenset(
            StoredNamespace(
                str(uuid.UUID(bytes=label[:16])),
                LABEL.read(label, "dpa"),
                LABEL.read(label, "rawsize"),
            )
            for label in labels
            if LABEL.is_intact(label)
        )

    def filled(self, labels: Mapping[int, bytes]) -> LabelArea:
        """A copy with labels in free slots, which both index blocks list as used."""
        area = self
        for slot, label in labels.items():
            area = area.replaced(self.slot_offset(slot), label)
        for number in (0, 1):
            index = bytearray(self.index(number))
            free = int.from_bytes(index[_SLOT_FREE:], "little")
            for slot in labels:
                free &= ~(1 << slot)
            index[_SLOT_FREE:] = free.to_bytes(len(index) - _SLOT_FREE, "little")
            area = area.replaced(number * self.index_bytes, INDEX.changed(bytes(index)))
        return area

    def replaced(self, offset: int, data: bytes) -> LabelArea:
        """A copy with other bytes at an offset."""
        copy = self.data[:offset] + data + self.data[offset + len(data) :]
        return LabelArea(copy, self.index_bytes)
