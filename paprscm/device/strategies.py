# SPDX-License-Identifier: GPL-2.0-or-later
"""Hypothesis strategies for machines with NVDIMMs: valid, with one flaw, and arbitrary."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace

from hypothesis import assume
from hypothesis import strategies as st

from paprscm.device.command_line import RawBackend, RawDimm, RawMachine
from paprscm.device.prediction import NO_UUID, predict
from paprscm.device.refusals import RefusalReason
from paprscm.papr import MAX_SLOTS, SCM_BLOCK_SIZE, SCM_MIN_LABEL_SIZE
from paprscm.vm.machine import GIB, MIB

Draw = Callable[[st.SearchStrategy[int]], int]
Flaw = Callable[[Draw, RawMachine], RawMachine]

_KIB = 1 << 10
# 4 GiB and more have an issue of their own (known_issues/qemu-nvdimm-label-size-truncated).
_LABELS = st.one_of(
    st.sampled_from([128, 132, 192, 256, 1024, 2048]).map(lambda kib: kib * _KIB),
    st.just(SCM_MIN_LABEL_SIZE + 1),
    st.integers(SCM_MIN_LABEL_SIZE, 4 * MIB),
    st.sampled_from([256 * MIB, GIB]),
)
_UUIDS = st.one_of(
    st.uuids().filter(lambda uuid: uuid.int != 0).map(str),
    st.uuids().filter(lambda uuid: uuid.int != 0).map(lambda uuid: str(uuid).upper()),
)


def _page_up(number: int) -> int:
    return -(-number // mmap.PAGESIZE) * mmap.PAGESIZE


@st.composite
def _dimms(
    draw: st.DrawFn, number: int, nodes: int, has_pmem: bool, has_private: bool
) -> tuple[RawBackend, RawDimm]:
    """A DIMM and its backend; QEMU may choose its slot and address.

    The backend of a spapr-nvdimm is a file (known_issues/qemu-nvdimm-on-volatile-file). A private
    mapping is small, because the host does not reserve more than it has.
    """
    driver = draw(st.sampled_from(["spapr-nvdimm", "nvdimm"]))
    kinds = ["file", "file", "memfd", "ram"] if driver == "nvdimm" else ["file"]
    kind = draw(st.sampled_from(kinds))
    label, blocks = draw(_LABELS), draw(st.integers(1, 3))
    share = draw(st.booleans()) or label > 4 * MIB or not has_private
    backend = RawBackend(
        size_bytes=blocks * SCM_BLOCK_SIZE + _page_up(label),
        kind=kind,
        share=share,
        pmem=kind == "file" and has_pmem and draw(st.booleans()),
    )
    dimm = RawDimm(
        driver=driver,
        memdev=number,
        label_bytes=label,
        uuid=draw(_UUIDS),
        node=draw(st.none() | st.integers(0, max(1, nodes) - 1)),
        pmem_override=driver == "spapr-nvdimm" and has_pmem and draw(st.booleans()),
        unarmed=draw(st.booleans()),
    )
    if kind == "file" and not backend.pmem and dimm.unarmed and draw(st.booleans()):
        backend = replace(backend, readonly=True)
    return backend, dimm


@st.composite
def valid_machines(
    draw: st.DrawFn, has_pmem: bool, has_private: bool, at_least: int = 0
) -> RawMachine:
    """A machine that QEMU must accept.

    Args:
        draw: see hypothesis.
        has_pmem: this QEMU has pmem and pmem-override.
        has_private: this QEMU accepts DIMMs whose backends are not shared.
        at_least: minimum number of DIMMs.
    """
    few = st.integers(at_least, 8)
    count = draw(st.one_of(few, few, few, st.integers(at_least, MAX_SLOTS)))
    memories = draw(st.lists(st.integers(0, 2), max_size=4).filter(lambda n: not n or any(n)))
    nodes = tuple(blocks * SCM_BLOCK_SIZE for blocks in memories)
    memory = sum(nodes) or draw(st.integers(1, 5)) * SCM_BLOCK_SIZE
    pairs = [draw(_dimms(n, len(nodes), has_pmem, has_private)) for n in range(count)]
    sizes = [_blocks(backend, dimm) for backend, dimm in pairs]
    spare = draw(st.integers(0, 4)) + (count == 0)
    room = (sum(sizes) + spare) * SCM_BLOCK_SIZE
    machine = RawMachine(
        memory_bytes=memory,
        slots=draw(st.integers(count, MAX_SLOTS)),
        maxmem_bytes=memory + room,
        nodes=nodes,
        backends=tuple(backend for backend, _ in pairs),
        dimms=tuple(dimm for _, dimm in pairs),
    )
    free, top = set(range(machine.slots or 0)), machine.base + room
    for number, size in enumerate(sizes):
        # From the top down; QEMU places the others from the bottom up.
        if draw(st.booleans()):
            gap = draw(st.integers(0, spare))
            spare -= gap
            top -= (gap + size) * SCM_BLOCK_SIZE
            machine = machine.with_dimm(number, addr=top)
        slot = draw(st.none() | st.just(-1) | st.sampled_from(sorted(free)))
        free.remove(min(free) if slot in (None, -1) else slot or 0)
        machine = machine.with_dimm(number, slot=slot)
    return machine


def _blocks(backend: RawBackend, dimm: RawDimm) -> int:
    return (backend.size_bytes - (dimm.label_bytes or 0)) // SCM_BLOCK_SIZE


@st.composite
def flawed_machines(
    draw: st.DrawFn, reason: RefusalReason, has_pmem: bool, has_private: bool
) -> RawMachine:
    """A valid machine with one flaw, which QEMU must refuse for this reason only."""
    valid = draw(valid_machines(has_pmem, has_private, at_least=2))
    machine = FLAWS[reason](lambda strategy: draw(strategy), valid)
    assume(predict(machine, has_override=has_pmem).reasons == {reason})
    return machine


@st.composite
def any_machines(draw: st.DrawFn, has_pmem: bool, has_private: bool) -> RawMachine:
    """A machine with independent values at and around their limits."""
    machine = draw(valid_machines(has_pmem, has_private))
    for number in range(len(machine.dimms)):
        changes: dict[str, st.SearchStrategy[object]] = {
            "label_bytes": st.none() | st.sampled_from([0, 64 * _KIB, 1 << 32]) | _LABELS,
            "uuid": st.none() | st.sampled_from([NO_UUID, "", "xyz"]) | _UUIDS,
            "slot": st.none() | st.integers(-2, MAX_SLOTS + 1),
            "addr": st.none() | st.integers(0, 40).map(lambda n: n * SCM_BLOCK_SIZE),
            "node": st.none() | st.integers(0, 5),
            "memdev": st.none() | st.integers(0, len(machine.backends) - 1),
        }
        name = draw(st.none() | st.sampled_from(sorted(changes)))
        if name is not None:
            machine = machine.with_dimm(number, **{name: draw(changes[name])})
    if draw(st.booleans()):
        machine = replace(machine, slots=draw(st.none() | st.integers(0, MAX_SLOTS + 1)))
    if draw(st.booleans()):
        maxmem = machine.memory_bytes + draw(st.integers(-1, 16)) * SCM_BLOCK_SIZE
        machine = replace(machine, maxmem_bytes=maxmem)
    # Other backends are a known issue.
    for dimm in machine.dimms:
        backend = machine.backends[dimm.memdev or 0]
        assume(dimm.driver == "nvdimm" or backend.kind == "file")
    return machine


def _of_dimm(**changes: Callable[[RawMachine], st.SearchStrategy[object]]) -> Flaw:
    """A flaw of one DIMM: other values for its properties."""

    def flaw(draw: Draw, machine: RawMachine) -> RawMachine:
        number = draw(st.integers(0, len(machine.dimms) - 1))
        values = {name: draw(make(machine)) for name, make in changes.items()}  # type: ignore[arg-type]
        return machine.with_dimm(number, **values)

    return flaw


def _of_backend(
    change: Callable[[Draw, RawBackend, RawDimm], RawBackend], *, more_room: int = GIB
) -> Flaw:
    """A flaw of one backend, which becomes a shared file first; QEMU places the DIMM."""

    def flaw(draw: Draw, machine: RawMachine) -> RawMachine:
        number = draw(st.integers(0, len(machine.dimms) - 1))
        plain = replace(machine.backends[number], kind="file", share=True, readonly=False)
        backends = list(machine.backends)
        backends[number] = change(draw, plain, machine.dimms[number])
        room = (machine.maxmem_bytes or 0) + more_room
        changed = replace(machine, backends=tuple(backends), maxmem_bytes=room)
        return changed.with_dimm(number, addr=None)

    return flaw


def _of_machine(change: Callable[[Draw, RawMachine], dict[str, object]]) -> Flaw:
    """A flaw of -m, -numa or -machine."""
    return lambda draw, machine: replace(machine, **change(draw, machine))  # type: ignore[arg-type]


def _readonly(draw: Draw, machine: RawMachine) -> RawMachine:
    number = draw(st.integers(0, len(machine.dimms) - 1))
    changed = machine.with_backend(number, kind="file", pmem=False, readonly=True)
    return changed.with_dimm(number, unarmed=False)


def _no_label(draw: Draw, machine: RawMachine) -> RawMachine:
    number = draw(st.integers(0, len(machine.dimms) - 1))
    size = _blocks(machine.backends[number], machine.dimms[number]) * SCM_BLOCK_SIZE
    return machine.with_backend(number, size_bytes=size).with_dimm(number, label_bytes=None)


def _no_file(draw: Draw, machine: RawMachine) -> RawMachine:
    # Not shared (known_issues/qemu-nvdimm-on-volatile-file); so it must be small.
    number = draw(st.integers(0, len(machine.dimms) - 1))
    changed = machine.with_backend(
        number,
        kind="ram",
        share=False,
        pmem=False,
        readonly=False,
        size_bytes=SCM_BLOCK_SIZE + SCM_MIN_LABEL_SIZE,
    )
    return changed.with_dimm(number, driver="spapr-nvdimm", label_bytes=SCM_MIN_LABEL_SIZE)


def _second(draw: Draw, machine: RawMachine) -> RawMachine:
    """The second DIMM overlaps the first."""
    first = predict(machine).placed[0]
    addr = (
        first.addr + draw(st.integers(0, first.size_bytes // SCM_BLOCK_SIZE - 1)) * SCM_BLOCK_SIZE
    )
    wide = replace(machine, maxmem_bytes=(machine.maxmem_bytes or 0) + GIB)
    return wide.with_dimm(0, addr=first.addr).with_dimm(1, addr=addr)


def _busy(draw: Draw, machine: RawMachine) -> RawMachine:
    """The second DIMM has the backend of the first, which would be valid for it."""
    same = {name: getattr(machine.dimms[0], name) for name in ("memdev", "driver", "label_bytes")}
    wide = replace(machine, maxmem_bytes=(machine.maxmem_bytes or 0) + GIB)
    return wide.with_dimm(1, **same, addr=None, unarmed=True, pmem_override=False)


def _fragmented(draw: Draw, machine: RawMachine) -> RawMachine:
    """A DIMM in the middle leaves enough room for the next one, but not contiguous."""
    half = draw(st.integers(1, 4)) * SCM_BLOCK_SIZE
    sizes = (SCM_BLOCK_SIZE, 2 * half)
    for number, size in enumerate(sizes):
        label = _page_up(machine.dimms[number].label_bytes or 0)
        machine = machine.with_backend(
            number, kind="file", share=True, readonly=False, size_bytes=size + label
        ).with_dimm(number, addr=None if number else machine.base + half)
    return replace(machine, maxmem_bytes=machine.memory_bytes + sum(sizes))


FLAWS: dict[RefusalReason, Flaw] = {
    RefusalReason.MAXMEM_BELOW_MEMORY: _of_machine(
        lambda draw, m: {"maxmem_bytes": m.memory_bytes - draw(st.integers(1, 255)) * MIB}
    ),
    RefusalReason.SLOTS_WITHOUT_MAXMEM: _of_machine(lambda draw, m: {"maxmem_bytes": None}),
    RefusalReason.SLOTS_WITHOUT_ROOM: _of_machine(lambda draw, m: {"maxmem_bytes": m.memory_bytes}),
    RefusalReason.BACKEND_SIZE: _of_backend(lambda draw, b, d: replace(b, size_bytes=0)),
    RefusalReason.FILE_TOO_SMALL: _of_backend(
        lambda draw, b, d: replace(
            b, file_bytes=b.size_bytes - draw(st.integers(1, 2 * mmap.PAGESIZE))
        )
    ),
    RefusalReason.NODES_ARE_NOT_MEMORY: _of_machine(
        lambda draw, m: {"nodes": (m.memory_bytes, draw(st.integers(1, 2)) * SCM_BLOCK_SIZE)}
    ),
    RefusalReason.MEMORY_UNALIGNED: _of_machine(
        lambda draw, m: {
            "nodes": (),
            "memory_bytes": m.memory_bytes + draw(st.integers(1, 255)) * MIB,
            "maxmem_bytes": (m.maxmem_bytes or 0) + GIB,
        }
    ),
    RefusalReason.MAXMEM_UNALIGNED: _of_machine(
        lambda draw, m: {"maxmem_bytes": (m.maxmem_bytes or 0) + draw(st.integers(1, 255)) * MIB}
    ),
    RefusalReason.NODE_UNALIGNED: _of_machine(
        lambda draw, m: {
            "nodes": (m.memory_bytes - (part := draw(st.integers(1, 128)) * MIB), part)
        }
    ),
    RefusalReason.MEMORY_TOO_SMALL: _of_machine(
        lambda draw, m: {"nodes": (), "memory_bytes": draw(st.integers(1, 127)) * MIB}
    ),
    RefusalReason.TOO_MANY_SLOTS: _of_machine(
        lambda draw, m: {"slots": draw(st.integers(MAX_SLOTS + 1, 1000))}
    ),
    RefusalReason.LABEL_TOO_SMALL: _of_dimm(
        label_bytes=lambda m: (
            st.sampled_from([SCM_MIN_LABEL_SIZE - 1, 0]) | st.integers(0, SCM_MIN_LABEL_SIZE - 1)
        )
    ),
    RefusalReason.UUID_MALFORMED: _of_dimm(
        uuid=lambda m: (
            st.sampled_from(["", "xyz", NO_UUID[:-1], NO_UUID + "0", "{" + NO_UUID + "}"])
            | st.uuids().map(lambda uuid: uuid.hex)
        )
    ),
    RefusalReason.OVERRIDE_UNKNOWN: _of_dimm(
        driver=lambda m: st.just("nvdimm"), pmem_override=lambda m: st.just(True)
    ),
    RefusalReason.NO_MEMDEV: _of_dimm(memdev=lambda m: st.none()),
    RefusalReason.LABEL_TOO_BIG: lambda draw, m: m.with_dimm(
        number := draw(st.integers(0, len(m.dimms) - 1)),
        label_bytes=draw(
            st.integers(1 - mmap.PAGESIZE, mmap.PAGESIZE).map(
                lambda more: m.backends[number].size_bytes + more
            )
            | st.sampled_from([4 * GIB, (1 << 63) - 1, (1 << 64) - 1])
        ),
    ),
    RefusalReason.ARMED_READONLY: _readonly,
    RefusalReason.NVDIMM_OFF: _of_machine(lambda draw, m: {"nvdimm": False}),
    RefusalReason.NO_LABEL: _no_label,
    RefusalReason.NOT_IN_BLOCKS: _of_backend(
        lambda draw, b, d: replace(
            b, size_bytes=b.size_bytes + draw(st.integers(1, 255 * 256)) * mmap.PAGESIZE
        )
    ),
    RefusalReason.NO_UUID: _of_dimm(uuid=lambda m: st.none() | st.just(NO_UUID)),
    RefusalReason.NO_FILE: _no_file,
    RefusalReason.SLOT_OUT_OF_RANGE: _of_dimm(
        slot=lambda m: (
            st.sampled_from([-2, -(1 << 31), (1 << 31) - 1, m.slots or 0])
            | st.integers(m.slots or 0, 64)
        )
    ),
    RefusalReason.SLOT_BUSY: lambda draw, m: m.with_dimm(1, slot=predict(m).placed[0].slot),
    RefusalReason.NO_SLOTS: lambda draw, m: replace(
        m, slots=0, dimms=tuple(replace(dimm, slot=None) for dimm in m.dimms)
    ),
    RefusalReason.NO_FREE_SLOT: lambda draw, m: replace(
        m,
        slots=draw(st.integers(1, len(m.dimms) - 1)),
        dimms=tuple(replace(dimm, slot=None) for dimm in m.dimms),
    ),
    RefusalReason.NO_SPACE: _of_backend(
        lambda draw, b, d: replace(
            b, size_bytes=b.size_bytes + draw(st.integers(5, 64)) * SCM_BLOCK_SIZE
        ),
        more_room=0,
    ),
    RefusalReason.ADDR_UNALIGNED: _of_dimm(
        addr=lambda m: st.integers(1, mmap.PAGESIZE - 1).map(lambda more: m.base + more)
    ),
    RefusalReason.ADDR_OUTSIDE: _of_dimm(
        addr=lambda m: st.sampled_from(
            [m.base - SCM_BLOCK_SIZE, m.base + m.room_bytes, (1 << 64) - SCM_BLOCK_SIZE]
        )
    ),
    RefusalReason.ADDR_CONFLICT: _second,
    RefusalReason.FRAGMENTED: _fragmented,
    RefusalReason.NODE_OUT_OF_RANGE: _of_dimm(
        node=lambda m: st.integers(max(1, len(m.nodes)), 8) | st.just((1 << 32) - 1)
    ),
    RefusalReason.MEMDEV_BUSY: _busy,
}
"""For each refusal, a mutation of a valid machine that triggers it (others may apply too)."""
