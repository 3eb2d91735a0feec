# SPDX-License-Identifier: GPL-2.0-or-later
"""Reader and writer of the flush state of spapr-nvdimm devices in QEMU's migration stream.

QEMU writes one section "spapr_nvdimm_states" per device (commit b5513584a08d, in v7.0):

    bool   hcall_flush_required
    u64    nvdimm_flush_token       token of the last flush
    qlist  completed_nvdimm_flush_states
    qlist  pending_nvdimm_flush_states

An element of a qlist is the byte 1, u64 continue_token, i64 hcall_ret, u32 drcidx; the byte 0 ends
the list (migration/vmstate-types.c:put_qlist). All numbers are big-endian. A section starts with
the byte QEMU_VM_SECTION_FULL, u32 section id, the length-prefixed name, u32 instance id, u32
version; it ends with the byte QEMU_VM_SECTION_FOOTER and the section id (migration/savevm.c).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from paprscm.errors import ContractError

_NAME: Final = b"spapr_nvdimm_states"
_VERSION: Final = 1
_FULL, _FOOTER = 0x04, 0x7E
_HEAD: Final = struct.Struct(f">BIB{len(_NAME)}sII")
_FIXED: Final = struct.Struct(">BQ")
_ELEMENT: Final = struct.Struct(">QqI")
_FOOT: Final = struct.Struct(">BI")


@dataclass(frozen=True)
class FlushState:
    """One flush in the stream.

    Attributes:
        token: its continue token.
        result: return code of its end; 0 while it is pending.
        drc: DRC index of its DIMM.
    """

    token: int
    result: int
    drc: int

    def pack(self) -> bytes:
        """The element of a qlist."""
        return b"\x01" + _ELEMENT.pack(self.token, self.result, self.drc)


@dataclass(frozen=True, kw_only=True)
class DimmState:
    """The section of one spapr-nvdimm device.

    Attributes:
        section: QEMU's number of the section.
        instance: position of the device in the order of creation, from 0.
        flush_required: the guest must use H_SCM_FLUSH.
        last_token: token of the last flush.
        completed: flushes whose end the guest has not asked for, in the order of the stream.
        pending: flushes whose sync has not ended.
        span: start and end of the section's fields in the stream, bytes.
    """

    section: int
    instance: int
    flush_required: bool
    last_token: int
    completed: tuple[FlushState, ...] = ()
    pending: tuple[FlushState, ...] = ()
    span: tuple[int, int] = (0, 0)

    def pack(self) -> bytes:
        """The section's fields as QEMU writes them."""
        lists = (self.completed, self.pending)
        body = b"".join(b"".join(state.pack() for state in part) + b"\0" for part in lists)
        return _FIXED.pack(self.flush_required, self.last_token) + body


def read_states(stream: bytes) -> list[DimmState]:
    """Flush states in a stream, by instance.

    Sections have no length, so a section is searched for by its name; its footer and its place in
    the stream's order prove that the name was not found by accident in other data.

    Raises:
        ContractError: a section is not well-formed, or instances are missing or occur twice.
    """
    states = []
    place = -1
    while (place := stream.find(_NAME, place + 1)) >= 0:
        start = place - 6
        if start < 0 or len(stream) < start + _HEAD.size:
            continue
        kind, section, length, _name, instance, version = _HEAD.unpack_from(stream, start)
        # The JSON description at the stream's end also contains the name.
        if kind != _FULL or length != len(_NAME):
            continue
        if version != _VERSION:
            raise ContractError(f"the section of DIMM {instance} has version {version}")
        states.append(_parse(stream, start + _HEAD.size, section, instance))
    if [state.instance for state in states] != list(range(len(states))):
        raise ContractError(f"instances of DIMMs in the stream: {[s.instance for s in states]}")
    return states


def rewrite(stream: bytes, states: Sequence[DimmState]) -> bytes:
    """The stream with the fields of these sections instead of the ones at their spans."""
    for state in sorted(states, key=lambda state: state.span, reverse=True):
        start, end = state.span
        stream = stream[:start] + state.pack() + stream[end:]
    return stream


def without(stream: bytes, state: DimmState) -> bytes:
    """The stream without a device's section."""
    start, end = state.span
    return stream[: start - _HEAD.size] + stream[end + _FOOT.size :]


def _parse(stream: bytes, start: int, section: int, instance: int) -> DimmState:
    try:
        required, last_token = _FIXED.unpack_from(stream, start)
        place = start + _FIXED.size
        lists: list[tuple[FlushState, ...]] = []
        for _ in range(2):
            items = []
            while stream[place]:
                if stream[place] != 1:
                    raise ContractError(f"a list of DIMM {instance} has the mark {stream[place]}")
                items.append(FlushState(*_ELEMENT.unpack_from(stream, place + 1)))
                place += 1 + _ELEMENT.size
            place += 1
            lists.append(tuple(items))
        footer, ended = _FOOT.unpack_from(stream, place)
    except (struct.error, IndexError) as error:
        raise ContractError(f"the stream ends in the section of DIMM {instance}") from error
    if required > 1 or (footer, ended) != (_FOOTER, section):
        raise ContractError(
            f"the section of DIMM {instance} is not well-formed: flag {required}, footer "
            f"{footer:#x} of section {ended}, expected {_FOOTER:#x} of section {section}"
        )
    return DimmState(
        section=section,
        instance=instance,
        flush_required=bool(required),
        last_token=last_token,
        completed=lists[0],
        pending=lists[1],
        span=(start, place),
    )
