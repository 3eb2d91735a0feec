# SPDX-License-Identifier: GPL-2.0-or-later
"""Flush states in synthetic migration streams."""

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paprscm.errors import ContractError
from paprscm.migration.stream import DimmState, FlushState, read_states, rewrite, without

WORD = st.integers(0, (1 << 64) - 1)
FLUSHES = st.lists(
    st.builds(FlushState, WORD, st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 2**32 - 1)),
    max_size=5,
).map(tuple)


def section(number: int, instance: int, fields: bytes, *, kind: int = 4, version: int = 1) -> bytes:
    """A section as QEMU writes it."""
    name = b"spapr_nvdimm_states"
    head = struct.pack(f">BIB{len(name)}sII", kind, number, len(name), name, instance, version)
    return head + fields + struct.pack(">BI", 0x7E, number)


def state(**changes: object) -> DimmState:
    base = DimmState(section=600, instance=0, flush_required=True, last_token=0)
    return replace(base, **changes)  # type: ignore[arg-type]


def streamed(*states: DimmState) -> bytes:
    """A stream with these states; its description at the end has the name, too."""
    sections = [section(one.section, one.instance, one.pack()) for one in states]
    return b"QEVM" + b"\0" * 50 + b"".join(sections) + b'\0\6{"name": "spapr_nvdimm_states"}'


def plain(one: DimmState) -> DimmState:
    return replace(one, span=(0, 0))


@given(st.booleans(), WORD, FLUSHES, FLUSHES)
def test_what_is_packed_is_read(
    required: bool,
    last: int,
    completed: tuple[FlushState, ...],
    pending: tuple[FlushState, ...],
) -> None:
    states = [
        state(
            section=600 + instance,
            instance=instance,
            flush_required=required,
            last_token=last,
            completed=completed,
            pending=pending,
        )
        for instance in (0, 1)
    ]
    stream = streamed(*states)
    found = read_states(stream)
    assert [plain(one) for one in found] == states
    assert rewrite(stream, found) == stream


def test_bytes_of_a_section() -> None:
    """The layout, independent of pack()."""
    fields = bytes.fromhex(
        "01"
        "0000000000000003"
        "01"
        "0000000000000001"
        "ffffffffffffffff"
        "90000002"
        "00"
        "01"
        "0000000000000003"
        "0000000000000000"
        "90000002"
        "00"
    )
    (found,) = read_states(b"x" * 7 + section(9, 0, fields))
    assert found.flush_required
    assert found.last_token == 3
    assert found.completed == (FlushState(1, -1, 0x90000002),)
    assert found.pending == (FlushState(3, 0, 0x90000002),)
    assert found.pack() == fields


def test_rewrite_and_without() -> None:
    stream = streamed(state(), state(section=601, instance=1, last_token=7))
    first, second = read_states(stream)
    longer = replace(first, pending=(FlushState(1, 0, 5),) * 3, last_token=3)
    changed = read_states(rewrite(stream, [second, longer]))
    assert [plain(one) for one in changed] == [plain(longer), plain(second)]
    alone = without(stream, second)
    assert [plain(one) for one in read_states(alone)] == [plain(first)]
    assert len(stream) - len(alone) == len(section(0, 0, second.pack()))


def test_no_section() -> None:
    assert read_states(b"") == []
    assert read_states(b"spapr_nvdimm_states") == []
    assert read_states(b"\0" * 30 + b"spapr_nvdimm_states" + b"\0" * 30) == []


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (streamed(state())[: 4 + 50 + 33 + 5], "ends in the section of DIMM 0"),
        (section(600, 0, state().pack()[:-1]), "DIMM 0"),
        (section(600, 0, state().pack() + b"\0"), "not well-formed"),
        (section(600, 0, b"\2" + state().pack()[1:]), "flag 2"),
        (section(600, 0, state().pack()[:9] + b"\2\0\0"), "has the mark 2"),
        (section(600, 0, state().pack(), version=2), "version 2"),
        (section(600, 1, state().pack()), r"instances of DIMMs in the stream: \[1\]"),
        (streamed(state(), state(section=601)), r"\[0, 0\]"),
    ],
)
def test_not_well_formed(stream: bytes, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        read_states(stream)
