# SPDX-License-Identifier: GPL-2.0-or-later
"""Reader of a BTT, as a kernel finds it after a power cut.

Source: drivers/nvdimm/btt.c and btt.h; Documentation/driver-api/nvdimm/btt.rst. All numbers are
little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_SIGNATURE: Final = b"BTT_ARENA_INFO\0\0"
_INFO: Final = struct.Struct("<16s16s16sIHHIIIIII5Q")
_INFO_BYTES: Final = 4096
_LANE: Final = struct.Struct("<16I")
"""Four entries of a lane (lba, old, new, sequence number), of which the first two are used."""
_OFFSETS: Final = (0, 4096)
"""Positions of the info block in a namespace: of BTT 2.0 and of BTT 1.1."""
_BLOCK: Final = 0x3FFFFFFF
_ZERO, _ERROR = 1 << 31, 1 << 30

Reader = Callable[[int, int], bytes]
"""Returns the bytes of a namespace: offset and length."""


class BrokenBttError(Exception):
    """A kernel cannot use this BTT."""


@dataclass(frozen=True)
class _Arena:
    read: Reader
    sector_bytes: int
    internal_bytes: int
    data: int
    map: int
    log: int
    lanes: int


def fletcher64(data: bytes) -> int:
    """Checksum of info blocks and label areas (drivers/nvdimm/core.c, nd_fletcher64)."""
    low = high = 0
    for (word,) in struct.iter_unpack("<I", data):
        low = (low + word) & 0xFFFFFFFF
        high += low
    return (high & 0xFFFFFFFF) << 32 | low


def read_btt(read: Reader, size: int) -> bytes:
    """Return the first bytes of a BTT with one arena.

    Args:
        read: reads the namespace.
        size: number of bytes, a multiple of the sector's size.

    Raises:
        BrokenBttError: a kernel would refuse it, or fail to read a sector.
    """
    arena = _arena(read)
    sectors = size // arena.sector_bytes
    blocks = list(struct.unpack(f"<{sectors}I", read(arena.map, 4 * sectors)))
    for lane in range(arena.lanes):
        lba, old, new = _newest(arena, lane)
        if lba < sectors and old != new and _postmap(lba, blocks[lba]) == old:
            # The power went off between the lane's entry and the map.
            blocks[lba] = new | _ZERO | _ERROR
    content = []
    for lba, entry in enumerate(blocks):
        if entry & (_ZERO | _ERROR) == _ERROR:
            raise BrokenBttError(f"sector {lba} has the error flag")
        if entry & (_ZERO | _ERROR) == _ZERO:
            content.append(bytes(arena.sector_bytes))
        else:
            at = arena.data + _postmap(lba, entry) * arena.internal_bytes
            content.append(read(at, arena.sector_bytes))
    return b"".join(content)


def _arena(read: Reader) -> _Arena:
    for start in _OFFSETS:
        block = read(start, _INFO_BYTES)
        if block.startswith(_SIGNATURE) and _is_intact(block):
            break
    else:
        raise BrokenBttError("no info block is valid")
    fields = _INFO.unpack_from(block)
    (_flags, _major, _minor, sector, _count, internal, _internal_count, lanes, _size) = fields[3:12]
    _next, data, map_, log, _info2 = fields[12:]
    return _Arena(read, sector, internal, start + data, start + map_, start + log, lanes)


def _is_intact(block: bytes) -> bool:
    return fletcher64(block[:-8] + bytes(8)) == int.from_bytes(block[-8:], "little")


def _newest(arena: _Arena, lane: int) -> tuple[int, int, int]:
    """The sector, and the old and new block, of a lane's newer entry (btt_log_get_old)."""
    numbers = _LANE.unpack(arena.read(arena.log + lane * _LANE.size, _LANE.size))
    first, second = numbers[3], numbers[7]
    if first and (first == second or first + second > 5):
        raise BrokenBttError(f"lane {lane} has the sequence numbers {first} and {second}")
    # The numbers go 1, 2, 3, 1, …
    first_is_newer = first != 0 and (second - first != 1 if first < second else first - second == 1)
    newer = 0 if first_is_newer else 4
    lba, old, new = numbers[newer : newer + 3]
    return lba, old & _BLOCK, new & _BLOCK


def _postmap(lba: int, entry: int) -> int:
    """The block of a map's entry; 0 means that it was never written."""
    return entry & _BLOCK if entry & (_ZERO | _ERROR) else lba
