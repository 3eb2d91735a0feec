# SPDX-License-Identifier: GPL-2.0-or-later
"""Table of invalid command lines, and the reasons for which QEMU refuses them.

Each reason was seen on QEMU 7.2.22, 10.0.13 and 11.1.3.
"""

from __future__ import annotations

from collections.abc import Mapping

from paprscm.device.refusals import (
    DIMM_BYTES,
    NODES,
    ORDINARY,
    TWO,
    Refusal,
    RefusalReason,
    backend,
    board,
    device,
    dimm,
    on,
    row,
)
from paprscm.papr import SCM_MIN_LABEL_SIZE
from paprscm.vm.machine import GIB, MIB

R = RefusalReason

SIZES = (
    row("label of 64K", dimm(label_size="64K"), R.LABEL_TOO_SMALL),
    row("label of 128K - 1", dimm(label_size="131071"), R.LABEL_TOO_SMALL),
    row("label of 0", dimm(label_size="0"), R.LABEL_TOO_SMALL),
    row("label of 2^64 - 1", dimm(label_size=str((1 << 64) - 1)), R.LABEL_TOO_BIG),
    row("label larger than the backend", dimm(label_size="1G"), R.LABEL_TOO_BIG),
    row("label as large as the backend", dimm(label_size=str(DIMM_BYTES)), R.LABEL_TOO_BIG),
    row("size of 1", on(size=1), R.LABEL_TOO_BIG, R.SIZE_UNALIGNED),
    row("no label", dimm(label_size=None), R.NO_LABEL),
    row("label leaves one page", dimm(label_size=str(DIMM_BYTES - 4096)), R.NOT_IN_BLOCKS),
    row("label not in whole pages", dimm(label_size="131073"), R.NOT_IN_BLOCKS),
    row("size no multiple", on(size=300 * MIB), R.NOT_IN_BLOCKS),
    row("size without the label", on(size=512 * MIB), R.NOT_IN_BLOCKS),
    row("label below 0", dimm(label_size="-1"), R.VALUE_MALFORMED),
    row("label of 2^64", dimm(label_size=str(1 << 64)), R.VALUE_MALFORMED),
    row("size below 0", on(size=-1), R.VALUE_MALFORMED),
    row("no size", on(size=None), R.PARAMETER_MISSING),
    row("size of 0", on(size=0), R.BACKEND_SIZE),
    row("size larger than the file", on(size=2 * GIB), R.FILE_TOO_SMALL),
    row("size of 2^63", on(size=1 << 63), R.FILE_TOO_SMALL, R.BACKEND_SIZE),
    row(
        "size larger than the room",
        on(path="{large}", size=8 * GIB + SCM_MIN_LABEL_SIZE),
        R.NO_SPACE,
    ),
    row("size set at the device", dimm(size="512M"), R.READ_ONLY),
)

UUIDS = (
    row("no uuid", dimm(uuid=None), R.NO_UUID),
    row("uuid of zeros", dimm(uuid="00000000-0000-0000-0000-000000000000"), R.NO_UUID),
    *(
        row(name, dimm(uuid=uuid), R.UUID_MALFORMED)
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
    row("backend in memory", on(kind="ram", path=None, more=""), R.NO_FILE),
    row("no memdev", dimm(memdev=None), R.NO_MEMDEV),
    row("read-only, but armed", on(more="share=on,readonly=on"), R.ARMED_READONLY),
    row("memdev not there", dimm(memdev="mem7"), R.NO_OBJECT),
    row("memdev is no backend", ("-object", "rng-random,id=mem0", *device()), R.NOT_A_BACKEND),
    row("memdev in use by a DIMM", (*dimm(), *device(1, memdev="mem0")), R.MEMDEV_BUSY),
    row(
        "memdev in use as main memory",
        board(
            *(*backend(size=512 * MIB), *device(label_size="256M")), memory="512M,slots=4,maxmem=8G"
        ),
        R.MEMDEV_BUSY,
        machine="memory-backend=mem0",
    ),
    row("no mem-path", on(path=None), R.PARAMETER_MISSING),
    row("unarmed neither on nor off", dimm(unarmed="2"), R.VALUE_MALFORMED),
    row(
        "pmem-override of a plain nvdimm",
        (*backend(), *device(driver="nvdimm", pmem_override="on")),
        R.OVERRIDE_UNKNOWN,
    ),
    row("mem-path empty", on(path=""), R.NO_BACKING_STORE),
    row("mem-path in no folder", on(path="{absent}/file"), R.NO_BACKING_STORE),
    row(
        "mem-path is a read-only folder",
        (*backend(path="{folder}", more="share=on,readonly=on"), *device(unarmed="on")),
        R.NO_BACKING_STORE,
    ),
    row("mem-path is a FIFO", on(path="{fifo}"), R.NO_BACKING_STORE),
    row("mem-path is /dev/null", on(path="/dev/null"), R.NO_BACKING_STORE),
    row("align no power of two", on(more="share=on,align=12288"), R.ALIGN_MALFORMED),
    row(
        "offset not in whole pages",
        on(path="{large}", more="share=on,offset=100"),
        R.OFFSET_UNALIGNED,
    ),
    row(
        "offset leaves too little",
        on(more="share=on,offset=4096"),
        *(R.FILE_TOO_SMALL, R.OFFSET_UNALIGNED),
    ),
    row("rom without readonly", on(more="share=on,rom=on"), R.ROM),
    row("no rom, but shared and read-only", on(more="share=on,readonly=on,rom=off"), R.ROM),
)

SLOTS = (
    *(
        row(f"slot {slot} of 4", dimm(slot=str(slot)), R.SLOT_OUT_OF_RANGE)
        for slot in (4, 9, 2**31 - 1, -2)
    ),
    row("slot of 2^31", dimm(slot=str(1 << 31)), R.VALUE_MALFORMED),
    row("slot in use", (*TWO, *device(1, slot="0")), R.SLOT_BUSY),
    row(
        "slot in use by ordinary memory",
        (*ORDINARY, "-device", "pc-dimm,memdev=ram,slot=0", *dimm(slot="0")),
        R.SLOT_BUSY,
    ),
    row("no free slot", board(*TWO, *device(1), memory="256M,slots=1,maxmem=8G"), R.NO_FREE_SLOT),
    row("no slots", board(*dimm(), memory="256M,maxmem=8G"), R.NO_SLOTS),
    row("33 slots", board(*dimm(), memory="256M,slots=33,maxmem=8G"), R.TOO_MANY_SLOTS),
    row("slots, but no maxmem", board(*dimm(), memory="256M,slots=4"), R.SLOTS_WITHOUT_MAXMEM),
    row(
        "maxmem leaves no room",
        board(*dimm(), memory="256M,slots=4,maxmem=256M"),
        R.SLOTS_WITHOUT_ROOM,
    ),
)

PLACES = (
    *(
        row(f"node {node} of 1", dimm(node=str(node)), R.NODE_OUT_OF_RANGE)
        for node in (1, 3, 2**32 - 1)
    ),
    row("node 2 of 2", (*NODES, *dimm(node="2")), R.NODE_OUT_OF_RANGE),
    row("node below 0", dimm(node="-1"), R.VALUE_MALFORMED),
    *(
        row(f"address {where}", dimm(addr=hex(address)), R.ADDR_OUTSIDE)
        for where, address in (
            ("below the room", 0x30000000),
            ("with its end behind the room", 0x220000000),
            ("behind the room", 0x230000000),
            ("with its end beyond 2^64", 2**64 - 256 * MIB),
        )
    ),
    # A QEMU with a fix of known_issues/qemu-nvdimm-address-not-aligned.md has another reason.
    row("address of the kernel", dimm(addr="0x1000"), R.ADDR_OUTSIDE, R.ADDR_UNALIGNED),
    row("address of 2^64 - 4096", dimm(addr=hex(2**64 - 4096)), R.ADDR_OUTSIDE, R.ADDR_UNALIGNED),
    row(
        "address of the last page in use",
        (*TWO, *device(1, addr="0x5ffff000")),
        R.ADDR_CONFLICT,
        R.ADDR_UNALIGNED,
    ),
    row("address not in whole pages", dimm(addr="0x40000001"), R.ADDR_UNALIGNED),
    row("address in use", (*TWO, *device(1, addr="0x50000000")), R.ADDR_CONFLICT),
    row(
        "room in two parts",
        board(
            *(*dimm(addr="0x50000000"), *backend(1, path="{second}"), *device(1)),
            memory="256M,slots=4,maxmem=1280M",
        ),
        R.FRAGMENTED,
    ),
)

MACHINES = (
    *(
        row(
            f"{driver} on a machine with nvdimm=off",
            (*backend(), *device(driver=driver)),
            R.NVDIMM_OFF,
            machine="nvdimm=off",
        )
        for driver in ("spapr-nvdimm", "nvdimm")
    ),
    # From before NVDIMMs, and from before any memory hotplug.
    row("machine type pseries-4.2", dimm(), R.OLD_MACHINE, machine="type=pseries-4.2"),
    row("machine type pseries-2.4", dimm(), R.OLD_MACHINE, machine="type=pseries-2.4"),
    row(
        "memory not in whole blocks",
        board(*dimm(), memory="300M,slots=4,maxmem=8G"),
        R.MEMORY_UNALIGNED,
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
    """The row with this name."""
    (match,) = (row for rows in GROUPS.values() for row in rows if row.name == name)
    return match
