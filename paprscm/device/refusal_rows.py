# SPDX-License-Identifier: GPL-2.0-or-later
"""Table of invalid command lines, and the messages with which each QEMU version refuses them.

Each text was seen on QEMU 7.2.22, 10.0.13 and 11.1.3; where it changed in between, the version is
that of the commit which changed it.
"""

from __future__ import annotations

from collections.abc import Mapping

from paprscm.device.refusals import (
    DIMM_BYTES,
    NODES,
    ORDINARY,
    TWO,
    Message,
    Refusal,
    Version,
    backend,
    board,
    changed,
    device,
    dimm,
    on,
    row,
)
from paprscm.papr import SCM_MIN_LABEL_SIZE
from paprscm.vm.machine import GIB, MIB

_VALIDATE = "hw/ppc/spapr_nvdimm.c:spapr_nvdimm_validate"
_REGION = "hw/mem/nvdimm.c:nvdimm_prepare_memory_region"
_REALIZE = "hw/mem/pc-dimm.c:pc_dimm_realize"
_ADDRESS = "hw/mem/memory-device.c:memory_device_get_free_addr"
_LABEL = "hw/mem/nvdimm.c:nvdimm_set_label_size"
_LINK = "qom/object.c:object_resolve_link"
_FILE = "system/physmem.c:qemu_ram_alloc_from_fd"
_SLOT = "hw/mem/pc-dimm.c:pc_dimm_get_free_slot"
_MEMORY = "hw/core/machine.c:machine_set_mem"
_BACKEND = "backends/hostmem-file.c:file_backend_memory_alloc"
_OPEN = "system/physmem.c:file_ram_open"
_ALLOC = "system/physmem.c:file_ram_alloc"
_VISITOR = "qapi/qobject-input-visitor.c"
_SET = "qom/object.c:object_property_set"

_MULTIPLE = "PAPR requires NVDIMM memory size (excluding label) to be a multiple of 256MB"
_SIZE = "Parameter 'label-size' expects size"
_BUSY = "can't use already busy memdev: {memdev}"
_NO_UUID = "NVDIMM device requires the uuid to be set"
_NO_DEVICE = "unable to map backing store for guest RAM: No such device"
_ONE_PAGE = (
    "{{memdev}} ({:#x}) is too small to contain nvdimm label ({:#x}) and aligned PMEM (0x1000)"
)
_NODE = "'DIMM property node has value {}' which exceeds the number of numa nodes: {}"
_MAXMEM = (
    "invalid value of maxmem: memory slots were specified but maximum memory size (0x10000000) "
    "is equal to the initial memory size (0x10000000)"
)
_ROM = ("Invalid parameter 'rom'", "property 'rom' = '{}' is {} with 'readonly' = '{}'")


def _short_label(size: int) -> str:
    return f"Property 'spapr-nvdimm.label-size' ({size:#x}) is required at least 0x20000"


def _no_room(label: int, size: int = DIMM_BYTES) -> str:
    return "the size of memdev " + _ONE_PAGE.format(size, label)


def _short_file(size: int, offset: int = 0) -> tuple[Message, ...]:
    # "physmem: fix qemu_ram_alloc_from_fd size calculation" (in v10.0).
    return changed(
        (10, 0),
        f"backing store size {DIMM_BYTES:#x} does not match 'size' option {size:#x}",
        f"{{memdev}} backing store size {DIMM_BYTES:#x} is too small for 'size' option "
        f"{size:#x} plus 'offset' option {offset:#x}",
    )


def _outside(address: int) -> str:
    return (
        f"can't add memory device [{address:#x}:0x20000000], "
        "usable range for memory devices [0x40000000:0x1f0000000]"
    )


SIZES = (
    row("label of 64K", dimm(label_size="64K"), _short_label(65536), _LABEL),
    row("label of 128K - 1", dimm(label_size="131071"), _short_label(131071), _LABEL),
    row("label of 0", dimm(label_size="0"), _short_label(0), _LABEL),
    row("label of 2^64 - 1", dimm(label_size=str((1 << 64) - 1)), _no_room((1 << 64) - 1), _REGION),
    row("label larger than the backend", dimm(label_size="1G"), _no_room(GIB), _REGION),
    row(
        "label as large as the backend",
        dimm(label_size=str(DIMM_BYTES)),
        _no_room(DIMM_BYTES),
        _REGION,
    ),
    row(
        "size of 1",
        on(size=1),
        # By Michal Privoznik, June 2024 (in v9.1).
        changed(
            (9, 1),
            _no_room(SCM_MIN_LABEL_SIZE, 1),
            "backend 'memory-backend-file' memory size must be multiple of 4 KiB",
        ),
        _REGION,
    ),
    row(
        "no label",
        dimm(label_size=None),
        "PAPR requires NVDIMM devices to have label-size set",
        _VALIDATE,
    ),
    row("label leaves one page", dimm(label_size=str(DIMM_BYTES - 4096)), _MULTIPLE, _VALIDATE),
    row("label not in whole pages", dimm(label_size="131073"), _MULTIPLE, _VALIDATE),
    row("size no multiple", on(size=300 * MIB), _MULTIPLE, _VALIDATE),
    row("size without the label", on(size=512 * MIB), _MULTIPLE, _VALIDATE),
    row("label below 0", dimm(label_size="-1"), _SIZE, _VISITOR),
    row("label of 2^64", dimm(label_size=str(1 << 64)), _SIZE, _VISITOR),
    row("size below 0", on(size=-1), "Parameter 'size' expects a size value", _VISITOR),
    row("no size", on(size=None), "Parameter 'size' is missing", _VISITOR),
    row(
        "size of 0",
        on(size=0),
        "property 'size' of memory-backend-file doesn't take value '0'",
        "backends/hostmem.c:host_memory_backend_set_size",
    ),
    row("size larger than the file", on(size=2 * GIB), _short_file(2 * GIB), _FILE),
    row("size of 2^63", on(size=1 << 63), _short_file(1 << 63), _FILE),
    row(
        "size larger than the room",
        on(path="{large}", size=8 * GIB + SCM_MIN_LABEL_SIZE),
        "not enough space, currently 0x0 in use of total space for memory devices 0x1f0000000",
        "hw/mem/memory-device.c:memory_device_check_addable",
    ),
    row(
        "size set at the device",
        dimm(size="512M"),
        "Property 'spapr-nvdimm.size' is not writable",
        _SET,
    ),
)

UUIDS = (
    row("no uuid", dimm(uuid=None), _NO_UUID, _VALIDATE),
    row("uuid of zeros", dimm(uuid="00000000-0000-0000-0000-000000000000"), _NO_UUID, _VALIDATE),
    *(
        row(
            name,
            dimm(uuid=uuid),
            "Property 'spapr-nvdimm.uuid' has invalid value",
            "hw/mem/nvdimm.c:nvdimm_set_uuid",
        )
        for name, uuid in (
            ("uuid of letters", "xyz"),
            ("uuid empty", ""),
            # Other devices take "auto" for a random one.
            ("uuid auto", "auto"),
            ("uuid without dashes", "7f9b6a0e52f54d0a8d5c0c3f1f0b9a11"),
            ("uuid too short", "7f9b6a0e-52f5-4d0a-8d5c-0c3f1f0b9a1"),
            ("uuid too long", "7f9b6a0e-52f5-4d0a-8d5c-0c3f1f0b9a111"),
            ("uuid not hexadecimal", "gf9b6a0e-52f5-4d0a-8d5c-0c3f1f0b9a11"),
            ("uuid with a blank", "7f9b6a0e-52f5-4d0a-8d5c-0c3f1f0b9a1 "),
        )
    ),
)

BACKENDS = (
    row(
        "backend in memory",
        on(kind="ram", path=None, more=""),
        "spapr-nvdimm device requires the memdev {memdev} to be of memory-backend-file type",
        _VALIDATE,
    ),
    row("no memdev", dimm(memdev=None), "'memdev' property must be set", _REGION),
    row(
        "read-only, but armed",
        on(more="share=on,readonly=on"),
        "'unarmed' property must be 'on' since memdev {memdev} is read-only",
        _REGION,
    ),
    row("memdev not there", dimm(memdev="mem7"), "Device 'mem7' not found", _LINK),
    row(
        "memdev is no backend",
        ("-object", "rng-random,id=mem0", *device()),
        "Invalid parameter type for 'memdev', expected: memory-backend",
        _LINK,
    ),
    row("memdev in use by a DIMM", (*dimm(), *device(1, memdev="mem0")), _BUSY, _REALIZE),
    row(
        "memdev in use as main memory",
        board(
            *(*backend(size=512 * MIB), *device(label_size="256M")), memory="512M,slots=4,maxmem=8G"
        ),
        _BUSY,
        _REALIZE,
        machine="memory-backend=mem0",
    ),
    row("no mem-path", on(path=None), "Parameter 'mem-path' is missing", _VISITOR),
    row(
        "unarmed neither on nor off",
        dimm(unarmed="2"),
        "Parameter 'unarmed' expects 'on' or 'off'",
        _VISITOR,
    ),
    row(
        "pmem-override of a plain nvdimm",
        (*backend(), *device(driver="nvdimm", pmem_override="on")),
        "Property 'nvdimm.pmem-override' not found",
        _SET,
    ),
    row(
        "mem-path empty",
        on(path=""),
        "can't open backing store  for guest RAM: No such file or directory",
        _OPEN,
    ),
    row(
        "mem-path in no folder",
        on(path="{absent}/file"),
        "can't open backing store {absent}/file for guest RAM: No such file or directory",
        _OPEN,
    ),
    row(
        "mem-path is a read-only folder",
        (*backend(path="{folder}", more="share=on,readonly=on"), *device(unarmed="on")),
        # QEMU commit ca01f1b89b08 ("softmmu/physmem: Never return directories from
        # file_ram_open()") (in v8.2).
        changed(
            (8, 2), _NO_DEVICE, "can't open backing store {folder} for guest RAM: Is a directory"
        ),
        _OPEN,
    ),
    row("mem-path is a FIFO", on(path="{fifo}"), _NO_DEVICE, _ALLOC),
    row(
        "mem-path is /dev/null",
        on(path="/dev/null"),
        "ftruncate: Invalid argument\n" + _NO_DEVICE,
        _ALLOC,
    ),
    row(
        "align no power of two",
        on(more="share=on,align=12288"),
        "alignment 0x3000 must be a power of two",
        _ALLOC,
    ),
    row(
        "offset not in whole pages",
        on(path="{large}", more="share=on,offset=100"),
        changed(
            (8, 1),
            "Invalid parameter 'offset'",
            "offset 0x64 must be multiples of page size 0x1000",
        ),
        _ALLOC,
    ),
    row(
        "offset leaves too little",
        on(more="share=on,offset=4096"),
        (
            Message("Invalid parameter 'offset'", until=(8, 1)),
            Message(_short_file(DIMM_BYTES)[0].text, since=(8, 1), until=(10, 0)),
            _short_file(DIMM_BYTES, 4096)[1],
        ),
        _FILE,
    ),
    row(
        "rom without readonly",
        on(more="share=on,rom=on"),
        changed((8, 2), _ROM[0], _ROM[1].format("on", "not supported", "off")),
        _BACKEND,
    ),
    row(
        "no rom, but shared and read-only",
        on(more="share=on,readonly=on,rom=off"),
        changed(
            (8, 2), _ROM[0], _ROM[1].format("off", "incompatible", "on") + " and 'share' = 'on'"
        ),
        _BACKEND,
    ),
)

SLOTS = (
    *(
        row(
            f"slot {slot} of 4",
            dimm(slot=str(slot)),
            f"invalid slot number {slot}, valid range is [0-3]",
            "hw/mem/pc-dimm.c:pc_dimm_pre_plug",
        )
        for slot in (4, 9, 2**31 - 1, -2)
    ),
    row("slot of 2^31", dimm(slot=str(1 << 31)), "Parameter 'slot' expects int32_t", _VISITOR),
    row("slot in use", (*TWO, *device(1, slot="0")), "slot 0 is busy", _SLOT),
    row(
        "slot in use by ordinary memory",
        (*ORDINARY, "-device", "pc-dimm,memdev=ram,slot=0", *dimm(slot="0")),
        "slot 0 is busy",
        _SLOT,
    ),
    row(
        "no free slot",
        board(*TWO, *device(1), memory="256M,slots=1,maxmem=8G"),
        "no free slots available",
        _SLOT,
    ),
    row(
        "no slots",
        board(*dimm(), memory="256M,maxmem=8G"),
        "no slots where allocated, please specify the 'slots' option",
        _SLOT,
    ),
    row(
        "33 slots",
        board(*dimm(), memory="256M,slots=33,maxmem=8G"),
        "Specified number of memory slots 33 exceeds max supported 32",
        "hw/ppc/spapr.c:spapr_machine_init",
    ),
    row(
        "slots, but no maxmem",
        board(*dimm(), memory="256M,slots=4"),
        "slots specified but no max-size",
        _MEMORY,
    ),
    row(
        "maxmem leaves no room", board(*dimm(), memory="256M,slots=4,maxmem=256M"), _MAXMEM, _MEMORY
    ),
)

PLACES = (
    *(
        row(f"node {node} of 1", dimm(node=str(node)), _NODE.format(node, 1), _REALIZE)
        for node in (1, 3, 2**32 - 1)
    ),
    row("node 2 of 2", (*NODES, *dimm(node="2")), _NODE.format(2, 2), _REALIZE),
    row("node below 0", dimm(node="-1"), "Parameter 'node' expects uint32_t", _VISITOR),
    *(
        row(f"address {where}", dimm(addr=hex(address)), _outside(address), _ADDRESS)
        for where, address in (
            ("of the kernel", 0x1000),
            ("below the room", 0x30000000),
            ("with its end behind the room", 0x220000000),
            ("behind the room", 0x230000000),
            ("with its end beyond 2^64", 2**64 - 4096),
        )
    ),
    row(
        "address not in whole pages",
        dimm(addr="0x40000001"),
        "address must be aligned to 0x1000 bytes",
        _ADDRESS,
    ),
    row(
        "address in use",
        (*TWO, *device(1, addr="0x5ffff000")),
        "address range conflicts with memory device id='nv0'",
        _ADDRESS,
    ),
    row(
        "room in two parts",
        board(
            *(*dimm(addr="0x50000000"), *backend(1, path="{second}"), *device(1)),
            memory="256M,slots=4,maxmem=1280M",
        ),
        "could not find position in guest address space for memory device - "
        "memory fragmented due to alignments",
        _ADDRESS,
    ),
)


def _old(kind: str, text: str, why: str, *, warns: Version, gone: Version) -> Refusal:
    """A machine type from before NVDIMMs, which newer versions warn of and then have no more."""
    warning = f"warning: Machine type '{kind}' is deprecated: {why}\n"
    unsupported = (
        f'unsupported machine type: "{kind}"\nUse -machine help to list supported machines'
    )
    messages = (
        Message(text, until=warns),
        Message(warning + text, since=warns, until=gone),
        Message(unsupported, since=gone),
    )
    source = "hw/ppc/spapr.c:spapr_memory_pre_plug"
    return row(f"machine type {kind}", dimm(), messages, source, machine=f"type={kind}")


MACHINES = (
    *(
        row(
            f"{driver} on a machine with nvdimm=off",
            (*backend(), *device(driver=driver)),
            "nvdimm device found but 'nvdimm=off' was set",
            _VALIDATE,
            machine="nvdimm=off",
        )
        for driver in ("spapr-nvdimm", "nvdimm")
    ),
    # Of these two, nothing was seen between 7.2 and 10.0, and between 10.0 and 11.1.
    _old(
        "pseries-4.2",
        "NVDIMM hotplug not supported for this machine",
        "machines more than 3 years old are subject to deletion after 6 years",
        warns=(9, 1),
        gone=(10, 2),
    ),
    _old(
        "pseries-2.4",
        "Memory hotplug not supported for this machine",
        "old and not maintained - use a 2.12+ version",
        warns=(9, 0),
        gone=(9, 2),
    ),
    row(
        "memory not in whole blocks",
        board(*dimm(), memory="300M,slots=4,maxmem=8G"),
        "Memory size 0x12c00000 is not aligned to 256 MiB",
        "hw/ppc/spapr.c:spapr_validate_node_memory",
    ),
)

GROUPS: Mapping[str, tuple[Refusal, ...]] = {
    "sizes and labels": SIZES,
    "uuid": UUIDS,
    "backend": BACKENDS,
    "slots": SLOTS,
    "nodes and addresses": PLACES,
    "machine": MACHINES,
}


def find_row(name: str) -> Refusal:
    """The row of that name."""
    (found,) = (row for rows in GROUPS.values() for row in rows if row.name == name)
    return found
