# SPDX-License-Identifier: GPL-2.0-or-later
"""Command lines that QEMU must refuse, and its reasons.

The command lines are in refusal_rows.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from paprscm.papr import SCM_MIN_LABEL_SIZE
from paprscm.vm.machine import GIB, MIB

Words = tuple[str, ...]

DIMM_BYTES = 512 * MIB + SCM_MIN_LABEL_SIZE
"""Size of a valid DIMM's backing file: two SCM blocks and the smallest label area."""

FILES: Mapping[str, int] = {
    "dimm": DIMM_BYTES,
    "second": DIMM_BYTES,
    "longer": DIMM_BYTES + 4096,
    "label4g": 256 * MIB + 4 * GIB,
    "large": 16 * GIB,
}
"""Backing files by the name of their placeholder, with their sizes in bytes."""

MEMORY = "256M,slots=4,maxmem=8G"
"""The board of most rows: room for 7.75 GiB of DIMMs at 1 GiB."""


class RefusalReason(Enum):
    """Reason for which QEMU refuses a machine; the value is a pattern of its message.

    The comments name the function that prints it, in the sources of QEMU 7.2 and 10.0.
    """

    # hw/core/machine.c: machine_set_mem
    MAXMEM_BELOW_MEMORY = r"maximum memory size \S+ must be at least the initial memory size"
    SLOTS_WITHOUT_MAXMEM = r"slots specified but no max-size"
    SLOTS_WITHOUT_ROOM = r"memory slots were specified but maximum memory size"
    # backends/hostmem.c: host_memory_backend_set_size
    BACKEND_SIZE = r"property 'size' of memory-backend-\w+ doesn't take value '\d+'"
    # physmem.c: qemu_ram_alloc_from_fd
    FILE_TOO_SMALL = r"backing store size \S+ (does not match|is too small for) 'size' option"
    # hw/core/numa.c: numa_complete_configuration
    NODES_ARE_NOT_MEMORY = r"total memory for NUMA nodes \S+ should equal RAM size"
    # hw/ppc/spapr.c: spapr_rma_size, which prints 128 as "80ld"
    MEMORY_TOO_SMALL = r"firmware requires >= \S+ guest RMA"
    # hw/ppc/spapr.c: spapr_validate_node_memory
    MEMORY_UNALIGNED = r"^Memory size \S+ is not aligned to 256 MiB"
    MAXMEM_UNALIGNED = r"Maximum memory size \S+ is not aligned to 256 MiB"
    NODE_UNALIGNED = r"Node \d+ memory size \S+ is not aligned to 256 MiB"
    # hw/ppc/spapr.c: spapr_machine_init
    TOO_MANY_SLOTS = r"number of memory slots \d+ exceeds max supported 32"
    # hw/mem/nvdimm.c: nvdimm_set_label_size, nvdimm_set_uuid
    LABEL_TOO_SMALL = r"label-size' \(0x[0-9a-f]+\) is required at least 0x20000"
    UUID_MALFORMED = r"uuid' has invalid value"
    # hw/ppc/spapr_nvdimm.c: only spapr-nvdimm has it, and only with libpmem
    OVERRIDE_UNKNOWN = r"Property '[\w-]+\.pmem-override' not found"
    # hw/mem/nvdimm.c: nvdimm_prepare_memory_region
    NO_MEMDEV = r"'memdev' property must be set"
    LABEL_TOO_BIG = r"the size of memdev \w+ \S+ is too small to contain nvdimm label"
    ARMED_READONLY = r"'unarmed' property must be 'on' since memdev \w+ is read-only"
    # hw/ppc/spapr_nvdimm.c: spapr_nvdimm_validate
    NVDIMM_OFF = r"nvdimm device found but 'nvdimm=off' was set"
    NO_LABEL = r"PAPR requires NVDIMM devices to have label-size set"
    NOT_IN_BLOCKS = (
        r"PAPR requires NVDIMM memory size \(excluding label\) to be a multiple of 256MB"
    )
    NO_UUID = r"NVDIMM device requires the uuid to be set"
    NO_FILE = r"spapr-nvdimm device requires the memdev \w+ to be of memory-backend-file type"
    # hw/mem/pc-dimm.c: pc_dimm_pre_plug, pc_dimm_get_free_slot
    SLOT_OUT_OF_RANGE = r"invalid slot number -?\d+, valid range is"
    SLOT_BUSY = r"slot \d+ is busy"
    NO_SLOTS = r"no slots where allocated, please specify the 'slots' option"
    NO_FREE_SLOT = r"no free slots available"
    # hw/mem/memory-device.c: memory_device_check_addable, memory_device_get_free_addr
    NO_SPACE = r"not enough space, currently \S+ in use of total space for memory devices"
    ADDR_UNALIGNED = (
        r"address must be aligned to \S+ bytes|'addr' of a memory device must be a multiple of"
    )
    ADDR_OUTSIDE = r"can't add memory device \S+ usable range for memory devices"
    ADDR_CONFLICT = r"address range conflicts with memory device id='\w+'"
    FRAGMENTED = r"could not find position in guest address space for memory device"
    # hw/mem/pc-dimm.c: pc_dimm_realize
    NODE_OUT_OF_RANGE = r"'DIMM property node has value \d+' which exceeds the number of numa nodes"
    MEMDEV_BUSY = r"can't use already busy memdev: \w+"

    # The reasons from here on are not predicted (prediction.py): no random machine has them.
    # qapi/qobject-input-visitor.c, qom/object.c: object_property_set, object_resolve_link
    VALUE_MALFORMED = r"Parameter '[\w-]+' expects"
    PARAMETER_MISSING = r"Parameter '[\w-]+' is missing"
    READ_ONLY = r"Property '[\w.-]+' is not writable"
    NO_OBJECT = r"Device '\w+' not found"
    NOT_A_BACKEND = r"Invalid parameter type for 'memdev', expected: memory-backend"
    # hw/core/qdev-properties.c, backends/hostmem.c: settable until it is realized, or mapped
    FIXED = r"Attempt to set .* after it was realized|cannot change property"
    IN_USE = r"is in use, can not be deleted|Cannot delete host memory backend '\w+'"
    # hw/mem/memory-device.c (since v9.1)
    SIZE_UNALIGNED = r"memory size must be multiple of"
    # physmem.c: file_ram_open, file_ram_alloc
    NO_BACKING_STORE = r"(can't open|unable to map) backing store "
    ALIGN_MALFORMED = r"alignment \S+ must be a power of two"
    # Since v8.1 and v8.2; an earlier QEMU does not have these properties.
    OFFSET_UNALIGNED = r"offset \S+ must be multiples of page size|Invalid parameter 'offset'"
    ROM = r"property 'rom' = '\w+' is (not supported|incompatible)|Invalid parameter 'rom'"
    # hw/ppc/spapr.c: spapr_memory_pre_plug, until QEMU drops the machine type
    OLD_MACHINE = r"hotplug not supported for this machine|unsupported machine type"
    # hw/ppc/spapr.c: spapr_machine_device_unplug_request
    NO_UNPLUG = r"nvdimm device hot unplug is not supported"

    @property
    def predicted(self) -> bool:
        """True if a random machine may be refused for this reason."""
        order = list(RefusalReason)
        return order.index(self) < order.index(RefusalReason.VALUE_MALFORMED)

    def is_in(self, text: str) -> bool:
        """Return True if QEMU's messages name this reason."""
        return re.search(self.value, text, re.MULTILINE) is not None


@dataclass(frozen=True)
class Refusal:
    """A command line that QEMU must refuse.

    Attributes:
        name: unique description of the error.
        words: the command line, with placeholders such as {dimm} (see `make_files`).
        reasons: QEMU names one of them, depending on its version.
        machine: machine options to add.
    """

    name: str
    words: Words
    reasons: tuple[RefusalReason, ...]
    machine: str = ""


def names_one(text: str, reasons: Iterable[RefusalReason]) -> bool:
    """Return True if QEMU's message names one of these reasons."""
    return any(reason.is_in(text) for reason in reasons)


def reason_patterns(reasons: Iterable[RefusalReason]) -> str:
    """The patterns of the reasons, for a report."""
    return " or ".join(f"/{reason.value}/" for reason in reasons)


def make_files(folder: Path) -> dict[str, str]:
    """Create the files of the rows' placeholders, all sparse.

    Returns: the paths by placeholder: the FILES, {fifo}, {folder} itself, and {absent}, which does
    not exist.
    """
    places = {name: str(folder / name) for name in (*FILES, "fifo", "absent")}
    for name, size in FILES.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)
    os.mkfifo(places["fifo"])
    return places | {"folder": str(folder)}


def filled(words: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """A command line with its placeholders filled in."""
    return [word.format_map(places) for word in words]


def backend(
    number: int = 0,
    *,
    kind: str = "file",
    path: str | None = "{dimm}",
    size: int | None = DIMM_BYTES,
    more: str = "share=on",
) -> Words:
    """The words of one memory backend; None omits a property.

    Args:
        number: number in its id, "mem0".
        kind: memory-backend-`kind`.
        path: mem-path.
        size: bytes.
        more: other properties, comma-separated.
    """
    words = [f"memory-backend-{kind},id=mem{number}"]
    words += [f"mem-path={path}"] if path is not None else []
    words += [f"size={size}"] if size is not None else []
    return ("-object", ",".join(words + ([more] if more else [])))


def device(number: int = 0, driver: str = "spapr-nvdimm", **changes: str | None) -> Words:
    """The words of one NVDIMM, valid except for the changes.

    Args:
        number: number in its id, "nv0", in its backend's id, "mem0", and in its uuid.
        driver: its type.
        changes: properties, with underscores for dashes; None omits one.
    """
    properties: dict[str, str | None] = {
        "id": f"nv{number}",
        "memdev": f"mem{number}",
        "label_size": "128K",
        "uuid": f"{number + 1:08x}-52f5-4d0a-8d5c-0c3f1f0b9a11",
        **changes,
    }
    words = [f"{k.replace('_', '-')}={v}" for k, v in properties.items() if v is not None]
    return ("-device", ",".join((driver, *words)))


def dimm(**changes: str | None) -> Words:
    """A valid backend, and a device on it, valid except for the changes."""
    return (*backend(), *device(0, "spapr-nvdimm", **changes))


def on(**changes: Any) -> Words:
    """A backend, valid except for the changes, and a valid device on it."""
    return (*backend(**changes), *device())


def board(*words: str, memory: str = MEMORY) -> Words:
    """A command line: the board's memory, and the rest."""
    return ("-m", memory, *words)


TWO = (*dimm(slot="0"), *backend(1, path="{second}"))
"""A DIMM, and the backend of a second one."""
ORDINARY = ("-object", "memory-backend-ram,id=ram,size=256M")
NODES = (*ORDINARY, "-numa", "node,nodeid=0,memdev=ram", "-numa", "node,nodeid=1")


def row(name: str, words: Words, *reasons: RefusalReason, machine: str = "") -> Refusal:
    """A row of the table; -m is MEMORY unless the words begin with -m."""
    return Refusal(name, words if words[0] == "-m" else board(*words), reasons, machine)


_ALL = 8 * GIB - 256 * MIB + SCM_MIN_LABEL_SIZE
LIMITS: Mapping[str, Words] = {
    "label of 128K": board(*dimm()),
    "label leaves one block": board(*dimm(label_size=str(DIMM_BYTES - 256 * MIB))),
    "file longer than the size": board(*on(path="{large}")),
    "all of the room": board(*on(path="{large}", size=_ALL)),
    "uuid in capitals": board(*dimm(uuid="7F9B6A0E-52F5-4D0A-8D5C-0C3F1F0B9A11")),
    "last slot of 32": board(*dimm(slot="31"), memory="256M,slots=32,maxmem=8G"),
    "last address": board(*dimm(addr="0x210000000")),
    "last node": board(*NODES, *dimm(node="1")),
    "read-only and unarmed": board(*backend(more="share=on,readonly=on"), *device(unarmed="on")),
    "empty file": board(*on(path="{absent}")),
}
"""Machines just within the limits: QEMU must accept them silently."""
