# SPDX-License-Identifier: GPL-2.0-or-later
"""Reader of a BTT, on one that the test makes."""

from __future__ import annotations

import struct

import pytest

from paprscm.power_cut.btt import BrokenBttError, fletcher64, read_btt

START, SECTOR = 4096, 512
DATA, MAP, LOG = 4096, 8192, 12288
LANES = 2


def btt() -> bytearray:
    """A namespace whose BTT has 4 sectors and 2 spare blocks, each filled with its number."""
    info = struct.pack(
        "<16s16s16sIHHIIIIII5Q",
        *(b"BTT_ARENA_INFO\0\0", bytes(16), bytes(16), 0, 1, 1),
        *(SECTOR, 4, SECTOR, 6, LANES, 4096, 0, DATA, MAP, LOG, 0),
    ).ljust(4088, b"\0")
    space = bytearray(START + LOG + 4096)
    space[START : START + 4096] = info + struct.pack("<Q", fletcher64(info + bytes(8)))
    for block in range(6):
        at = START + DATA + block * SECTOR
        space[at : at + SECTOR] = bytes([block]) * SECTOR
    for lane in range(LANES):
        put_lane(space, lane, 0, (lane, 4 + lane, 4 + lane, 1))
    return space


def put_lane(space: bytearray, lane: int, slot: int, entry: tuple[int, int, int, int]) -> None:
    struct.pack_into("<4I", space, START + LOG + lane * 64 + slot * 16, *entry)


def put_map(space: bytearray, lba: int, entry: int) -> None:
    struct.pack_into("<I", space, START + MAP + 4 * lba, entry)


def blocks(space: bytearray) -> list[int]:
    content = read_btt(lambda at, size: bytes(space[at : at + size]), 4 * SECTOR)
    return [content[at] for at in range(0, len(content), SECTOR)]


def test_unwritten_sectors_are_in_order() -> None:
    assert blocks(btt()) == [0, 1, 2, 3]


def test_the_map_says_where_a_sector_is() -> None:
    space = btt()
    put_map(space, 2, 0xC0000004)
    put_map(space, 3, 0x80000001)
    assert blocks(space) == [0, 1, 4, 0]
    put_map(space, 1, 0x40000001)
    with pytest.raises(BrokenBttError, match="sector 1 has the error flag"):
        blocks(space)


@pytest.mark.parametrize(("older", "newer"), [(1, 2), (2, 3), (3, 1)])
def test_a_lane_completes_the_map(older: int, newer: int) -> None:
    for slot in (0, 1):
        space = btt()
        put_lane(space, 0, 1 - slot, (0, 4, 4, older))
        put_lane(space, 0, slot, (2, 2, 4, newer))
        assert blocks(space) == [0, 1, 4, 3]
        # The map has been written since: with another block, the lane's entry is old.
        put_map(space, 2, 0xC0000005)
        assert blocks(space) == [0, 1, 5, 3]


def test_a_broken_btt_is_refused() -> None:
    space = btt()
    put_lane(space, 1, 1, (0, 1, 2, 1))
    with pytest.raises(BrokenBttError, match="lane 1 has the sequence numbers 1 and 1"):
        blocks(space)
    space[START + 20] ^= 1
    with pytest.raises(BrokenBttError, match="no info block"):
        blocks(space)
