# SPDX-License-Identifier: GPL-2.0-or-later
"""Prediction of the machines with NVDIMMs that QEMU must accept, and of the reasons for refusals.

The rules follow the contract and QEMU's sources, not observed results; each names its source.
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
    """Slot, address and usable size of a DIMM."""

    slot: int
    addr: int
    size_bytes: int


@dataclass(frozen=True)
class Prediction:
    """Predicted result of a command line.

    Attributes:
        reasons: possible reasons of the refusal, from the same step of QEMU; empty: accepted.
        placed: slot and address of each DIMM; if refused, of those before the refused one.
    """

    reasons: frozenset[RefusalReason]
    placed: tuple[PlacedDimm, ...] = ()


def predict(machine: RawMachine, *, has_override: bool = True) -> Prediction:
    """Predict QEMU's result for a machine: reasons of a refusal, or slots and addresses.

    Args:
        machine: the command line.
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
            yield RefusalReason.BACKEND_SIZE
        elif backend.file_bytes is not None and backend.file_bytes < backend.size_bytes:
            yield RefusalReason.FILE_TOO_SMALL


def _numa(machine: RawMachine) -> Iterator[RefusalReason]:
    if machine.nodes and sum(machine.nodes) != machine.memory_bytes:
        yield RefusalReason.NODES_ARE_NOT_MEMORY


def _first_memory(machine: RawMachine) -> Iterator[RefusalReason]:
    """spapr.c:spapr_node0_size: the real mode area is in the first node with memory."""
    first = next((memory for memory in machine.nodes if memory), machine.memory_bytes)
    # The area is a power of two: it is below the limit if the memory is.
    if first < 128 << 20:
        yield RefusalReason.MEMORY_TOO_SMALL


def _board(machine: RawMachine) -> Iterator[RefusalReason]:
    """spapr.c: memory consists of LMBs of 256 MiB, and there are at most 32 slots."""
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
    rest_bytes = max(0, backend.size_bytes - (dimm.label_bytes or 0))
    return rest_bytes - rest_bytes % backend.align_bytes()


def _region(machine: RawMachine, dimm: RawDimm) -> Iterator[RefusalReason]:
    """nvdimm.c:nvdimm_prepare_memory_region, which QEMU calls first."""
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
    """The requested slot, or the lowest free one; -1 requests none."""
    slots = machine.slots or 0
    used = {other.slot for other in before}
    if dimm.slot not in (None, -1):
        requested = dimm.slot or 0
        if not 0 <= requested < slots:
            return RefusalReason.SLOT_OUT_OF_RANGE
        return RefusalReason.SLOT_BUSY if requested in used else requested
    if not slots:
        return RefusalReason.NO_SLOTS
    return min({*range(slots)} - used, default=RefusalReason.NO_FREE_SLOT)


def _addr(
    machine: RawMachine, dimm: RawDimm, before: tuple[PlacedDimm, ...]
) -> int | RefusalReason:
    """The requested address, or the lowest that fits."""
    backend = machine.backends[dimm.memdev or 0]
    size, align = _usable(backend, dimm), backend.align_bytes()
    if sum(other.size_bytes for other in before) + size > machine.room_bytes:
        return RefusalReason.NO_SPACE
    used_ranges = sorted((other.addr, other.addr + other.size_bytes) for other in before)
    if dimm.addr:
        start, end = dimm.addr, dimm.addr + size
        if start % align:
            return RefusalReason.ADDR_UNALIGNED
        if start < machine.base or end > machine.base + machine.room_bytes:
            return RefusalReason.ADDR_OUTSIDE
        busy = any(start < other_end and other < end for other, other_end in used_ranges)
        return RefusalReason.ADDR_CONFLICT if busy else start
    addr = machine.base
    for other, other_end in used_ranges:
        if addr < other_end and other < addr + size:
            addr = -(-other_end // align) * align
    return addr if addr + size <= machine.base + machine.room_bytes else RefusalReason.FRAGMENTED
