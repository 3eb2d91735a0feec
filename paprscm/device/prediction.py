# SPDX-License-Identifier: GPL-2.0-or-later
"""Which machines with NVDIMMs QEMU must take, and why it must refuse the others.

The rules are written from the contract and QEMU's sources, not from answers; each names its source.
"""

from __future__ import annotations

import re
import uuid as uuids
from collections.abc import Iterator
from dataclasses import dataclass

from paprscm.device.command_line import RawBackend, RawDimm, RawMachine
from paprscm.device.refusals import RefusalReason
from paprscm.papr import MAX_SLOTS, SCM_BLOCK_SIZE, SCM_MIN_LABEL_SIZE

NO_UUID = str(uuids.UUID(int=0))


@dataclass(frozen=True)
class PlacedDimm:
    """Address of a DIMM, and the size that the guest can use."""

    slot: int
    addr: int
    size_bytes: int


@dataclass(frozen=True)
class Prediction:
    """Predicted result of a command line.

    Attributes:
        reasons: why it is refused; QEMU may name any of them, for they are of the same step. Empty:
            it is accepted.
        placed: where each DIMM is; when refused, those before the one that was.
    """

    reasons: frozenset[RefusalReason]
    placed: tuple[PlacedDimm, ...] = ()


def predict(machine: RawMachine, *, has_override: bool = True) -> Prediction:
    """Predict whether QEMU accepts the machine: the reasons why not, or the places of the DIMMs.

    Args:
        has_override: this QEMU's spapr-nvdimm has pmem-override.
    """
    for step in (_memory, _backends, _numa, _first_memory, _board):
        reasons = frozenset(step(machine))
        if reasons:
            return Prediction(reasons)
    placed: list[PlacedDimm] = []
    for number, dimm in enumerate(machine.dimms):
        reasons = frozenset(_properties(dimm, has_override)) or frozenset(_region(machine, dimm))
        if not reasons:
            before = tuple(placed)
            slot, addr = _slot(machine, dimm, before), _addr(machine, dimm, before)
            reasons = frozenset(_plug(machine, number))
            reasons |= {answer for answer in (slot, addr) if isinstance(answer, RefusalReason)}
            if isinstance(slot, int) and isinstance(addr, int) and not reasons:
                backend = machine.backends[dimm.memdev or 0]
                placed.append(PlacedDimm(slot, addr, _usable(backend, dimm)))
        if reasons:
            return Prediction(reasons, tuple(placed))
    return Prediction(frozenset(), tuple(placed))


def _memory(machine: RawMachine) -> Iterator[RefusalReason]:
    """machine.c:machine_set_mem."""
    if machine.maxmem_bytes is None:
        if machine.slots is not None:
            yield RefusalReason.SLOTS_WITHOUT_MAXMEM
    elif machine.maxmem_bytes < machine.memory_bytes:
        yield RefusalReason.MAXMEM_BELOW_MEMORY
    elif machine.slots and machine.maxmem_bytes == machine.memory_bytes:
        yield RefusalReason.SLOTS_WITHOUT_ROOM


def _backends(machine: RawMachine) -> Iterator[RefusalReason]:
    for backend in machine.backends:
        if backend.size_bytes == 0:
            yield RefusalReason.EMPTY_BACKEND
        elif backend.file_bytes is not None and backend.file_bytes < backend.size_bytes:
            yield RefusalReason.FILE_TOO_SMALL


def _numa(machine: RawMachine) -> Iterator[RefusalReason]:
    if machine.nodes and sum(machine.nodes) != machine.memory_bytes:
        yield RefusalReason.NODES_ARE_NOT_MEMORY


def _first_memory(machine: RawMachine) -> Iterator[RefusalReason]:
    """spapr.c:spapr_node0_size: the real mode area is in the first node that has memory."""
    first = next((memory for memory in machine.nodes if memory), machine.memory_bytes)
    # A power of two is as small as that when the memory is.
    if first < 128 << 20:
        yield RefusalReason.MEMORY_TOO_SMALL


def _board(machine: RawMachine) -> Iterator[RefusalReason]:
    """spapr.c: memory comes in LMBs of 256 MiB, and there are 32 slots at most."""
    if machine.memory_bytes % SCM_BLOCK_SIZE:
        yield RefusalReason.MEMORY_UNALIGNED
    if (machine.maxmem_bytes or 0) % SCM_BLOCK_SIZE:
        yield RefusalReason.MAXMEM_UNALIGNED
    if any(memory % SCM_BLOCK_SIZE for memory in machine.nodes):
        yield RefusalReason.NODE_UNALIGNED
    if (machine.slots or 0) > MAX_SLOTS:
        yield RefusalReason.TOO_MANY_SLOTS


def _properties(dimm: RawDimm, has_override: bool) -> Iterator[RefusalReason]:
    """Check each property by itself."""
    if dimm.label_bytes is not None and dimm.label_bytes < SCM_MIN_LABEL_SIZE:
        yield RefusalReason.LABEL_TOO_SMALL
    form = r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
    if dimm.uuid is not None and not re.fullmatch(form, dimm.uuid):
        yield RefusalReason.UUID_MALFORMED
    if dimm.pmem_override and not (has_override and dimm.driver == "spapr-nvdimm"):
        yield RefusalReason.OVERRIDE_UNKNOWN


def _usable(backend: RawBackend, dimm: RawDimm) -> int:
    left = max(0, backend.size_bytes - (dimm.label_bytes or 0))
    return left - left % backend.align_bytes()


def _region(machine: RawMachine, dimm: RawDimm) -> Iterator[RefusalReason]:
    """nvdimm.c:nvdimm_prepare_memory_region, which QEMU asks first of all."""
    if dimm.memdev is None:
        yield RefusalReason.NO_MEMDEV
        return
    backend = machine.backends[dimm.memdev]
    if not _usable(backend, dimm):
        yield RefusalReason.LABEL_TOO_BIG
    if backend.readonly and not dimm.unarmed:
        yield RefusalReason.ARMED_READONLY


def _plug(machine: RawMachine, number: int) -> Iterator[RefusalReason]:
    """spapr_nvdimm.c:spapr_nvdimm_validate, pc-dimm.c:pc_dimm_realize."""
    dimm = machine.dimms[number]
    backend = machine.backends[dimm.memdev or 0]
    size = _usable(backend, dimm)
    if not machine.nvdimm:
        yield RefusalReason.NVDIMM_OFF
    if dimm.label_bytes is None:
        yield RefusalReason.NO_LABEL
    if size % SCM_BLOCK_SIZE:
        yield RefusalReason.NOT_IN_BLOCKS
    if dimm.uuid in (None, NO_UUID):
        yield RefusalReason.NO_UUID
    if dimm.driver == "spapr-nvdimm" and backend.kind == "ram":
        yield RefusalReason.NO_FILE
    if (dimm.node or 0) >= max(1, len(machine.nodes)):
        yield RefusalReason.NODE_OUT_OF_RANGE
    if dimm.memdev in (other.memdev for other in machine.dimms[:number]):
        yield RefusalReason.MEMDEV_BUSY


def _slot(
    machine: RawMachine, dimm: RawDimm, before: tuple[PlacedDimm, ...]
) -> int | RefusalReason:
    """The slot that was asked for, or the lowest that is free; -1 does not ask."""
    slots = machine.slots or 0
    taken = {other.slot for other in before}
    if dimm.slot not in (None, -1):
        wanted = dimm.slot or 0
        if not 0 <= wanted < slots:
            return RefusalReason.SLOT_OUT_OF_RANGE
        return RefusalReason.SLOT_BUSY if wanted in taken else wanted
    if not slots:
        return RefusalReason.NO_SLOTS
    return min({*range(slots)} - taken, default=RefusalReason.NO_FREE_SLOT)


def _addr(
    machine: RawMachine, dimm: RawDimm, before: tuple[PlacedDimm, ...]
) -> int | RefusalReason:
    """The address that was asked for, or the lowest at which it fits."""
    backend = machine.backends[dimm.memdev or 0]
    size, align = _usable(backend, dimm), backend.align_bytes()
    if sum(other.size_bytes for other in before) + size > machine.room_bytes:
        return RefusalReason.NO_SPACE
    taken = sorted((other.addr, other.addr + other.size_bytes) for other in before)
    if dimm.addr:
        start, end = dimm.addr, dimm.addr + size
        if start % align:
            return RefusalReason.ADDR_UNALIGNED
        if start < machine.base or end > machine.base + machine.room_bytes:
            return RefusalReason.ADDR_OUTSIDE
        busy = any(start < other_end and other < end for other, other_end in taken)
        return RefusalReason.ADDR_CONFLICT if busy else start
    addr = machine.base
    for other, other_end in taken:
        if addr < other_end and other < addr + size:
            addr = -(-other_end // align) * align
    return addr if addr + size <= machine.base + machine.room_bytes else RefusalReason.FRAGMENTED
