# SPDX-License-Identifier: GPL-2.0-or-later
"""Command line with NVDIMMs as data, valid or invalid; `vm.machine.Machine` is valid only."""

from __future__ import annotations

import mmap
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paprscm.papr import SCM_MIN_LABEL_SIZE
from paprscm.vm.machine import GIB, MIB


@dataclass(frozen=True)
class RawBackend:
    """The memory behind a DIMM.

    Attributes:
        size_bytes: its size, label area included.
        kind: the rest of the type's name after "memory-backend-": "file", "memfd" or "ram".
        share, pmem, readonly: as of the backend; pmem and readonly are for files only.
        file_bytes: size of an existing file; None: QEMU creates the file, if it can.
    """

    size_bytes: int
    kind: str = "file"
    share: bool = True
    pmem: bool = False
    readonly: bool = False
    file_bytes: int | None = None

    def align_bytes(self) -> int:
        """Alignment, bytes: the size is rounded down to it, and the address must be a multiple.

        The page size for memory of a descriptor (physmem.c:file_ram_alloc), the size of huge pages
        for anonymous memory (osdep.h:QEMU_VMALLOC_ALIGN).
        """
        return 2 * MIB if self.kind == "ram" else mmap.PAGESIZE


@dataclass(frozen=True)
class RawDimm:
    """One DIMM; None: the property is not on the command line.

    Attributes:
        memdev: number of its backend.
        uuid: any text.
        addr: None or 0: QEMU chooses.
    """

    driver: str = "spapr-nvdimm"
    memdev: int | None = 0
    label_bytes: int | None = SCM_MIN_LABEL_SIZE
    uuid: str | None = None
    slot: int | None = None
    addr: int | None = None
    node: int | None = None
    pmem_override: bool = False
    unarmed: bool = False


@dataclass(frozen=True)
class RawMachine:
    """A machine's memory and its DIMMs.

    Attributes:
        memory_bytes, slots, maxmem_bytes: of -m; whole MiB.
        nodes: memory of each NUMA node, bytes; empty: no -numa.
        distances: (node, other node, distance) of each pair; empty: no -numa dist.
        nvdimm: the machine option.
    """

    memory_bytes: int = 256 * MIB
    slots: int | None = None
    maxmem_bytes: int | None = None
    nodes: tuple[int, ...] = ()
    distances: tuple[tuple[int, int, int], ...] = ()
    nvdimm: bool = True
    backends: tuple[RawBackend, ...] = ()
    dimms: tuple[RawDimm, ...] = ()

    @property
    def base(self) -> int:
        """Address at which the memory of DIMMs begins (spapr.h:SPAPR_DEVICE_MEM_ALIGN)."""
        return -(-self.memory_bytes // GIB) * GIB

    @property
    def room_bytes(self) -> int:
        """Size of the memory for DIMMs, bytes."""
        return (self.maxmem_bytes or self.memory_bytes) - self.memory_bytes

    def with_dimm(self, number: int, **changes: Any) -> RawMachine:
        """Return a copy in which fields of one DIMM differ."""
        dimms = list(self.dimms)
        dimms[number] = replace(dimms[number], **changes)
        return replace(self, dimms=tuple(dimms))

    def with_backend(self, number: int, **changes: Any) -> RawMachine:
        """Return a copy in which fields of one backend differ."""
        backends = list(self.backends)
        backends[number] = replace(backends[number], **changes)
        return replace(self, backends=tuple(backends))

    def files(self) -> dict[str, int]:
        """Files that must exist before QEMU starts, with their sizes in bytes."""
        return {
            f"file{n}": b.size_bytes if b.file_bytes is None else b.file_bytes
            for n, b in enumerate(self.backends)
            if b.kind == "file" and (b.readonly or b.file_bytes is not None)
        }

    def option(self) -> str:
        """Additional options of -machine."""
        return "" if self.nvdimm else "nvdimm=off"

    def words(self) -> list[str]:
        """The command line, with relative file names."""
        words = ["-m", _joined(f"size={_size(self.memory_bytes)}", *self._more_memory())]
        for number, memory in enumerate(self.nodes):
            if memory:
                words += ["-object", f"memory-backend-ram,id=ram{number},size={_size(memory)}"]
            words += ["-numa", _joined("node", f"memdev=ram{number}" if memory else "")]
        for one, other, away in self.distances:
            words += ["-numa", f"dist,src={one},dst={other},val={away}"]
        for number, backend in enumerate(self.backends):
            words += ["-object", _backend_words(number, backend)]
        for number, dimm in enumerate(self.dimms):
            words += ["-device", _dimm_words(number, dimm)]
        return words

    def _more_memory(self) -> Iterator[str]:
        if self.slots is not None:
            yield f"slots={self.slots}"
        if self.maxmem_bytes is not None:
            yield f"maxmem={_size(self.maxmem_bytes)}"

    def script(self, qemu: Sequence[str]) -> str:
        """Shell command that starts the same machine in a temporary folder."""
        files = "".join(f"truncate -s {size} {name} && " for name, size in self.files().items())
        kind = _joined("pseries", self.option())
        argv = [*qemu, "-machine", kind, "-nodefaults", "-display", "none", "-S"]
        return f'cd "$(mktemp -d)" && {files}' + shlex.join(
            [*argv, "-monitor", "stdio", *self.words()]
        )


def _backend_words(number: int, backend: RawBackend) -> str:
    is_file = backend.kind == "file"
    return _joined(
        f"memory-backend-{backend.kind},id=mem{number},size={_size(backend.size_bytes)}",
        f"mem-path=file{number}" if is_file else "",
        f"share={'on' if backend.share else 'off'}",
        "pmem=on" if backend.pmem else "",
        "readonly=on" if backend.readonly else "",
    )


def _dimm_words(number: int, dimm: RawDimm) -> str:
    properties = {
        "label-size": None if dimm.label_bytes is None else _size(dimm.label_bytes),
        "uuid": dimm.uuid,
        "slot": dimm.slot,
        "addr": None if dimm.addr is None else hex(dimm.addr),
        "node": dimm.node,
        "pmem-override": "on" if dimm.pmem_override else None,
        "unarmed": "on" if dimm.unarmed else None,
    }
    return _joined(
        f"{dimm.driver},id=nv{number}",
        f"memdev=mem{dimm.memdev}" if dimm.memdev is not None else "",
        *(f"{name}={value}" for name, value in properties.items() if value is not None),
    )


def _joined(*words: str) -> str:
    return ",".join(word for word in words if word)


def _size(number: int) -> str:
    for unit, suffix in ((MIB, "M"), (1 << 10, "K")):
        if number and number % unit == 0:
            return f"{number // unit}{suffix}"
    return str(number)
