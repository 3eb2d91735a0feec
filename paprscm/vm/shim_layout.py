# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that the flush shim shares with this process: the structs of host_tools/flush_shim.c."""

from __future__ import annotations

import ctypes
import hashlib
from enum import IntEnum, IntFlag
from typing import Any, Final

MAGIC: Final = int.from_bytes(b"paprshim", "big")
FILES: Final = 64
"""Files that can be watched."""
RECORDS: Final = 65536
"""Records that are kept; later ones overwrite the oldest."""


class Operation(IntEnum):
    """A call that makes a file's content durable; the values are those of flush_shim.c."""

    FDATASYNC = 0
    FSYNC = 1
    MSYNC = 2
    PMEM_PERSIST = 3
    LABEL = 4
    """Any of them on a part of the file behind the DIMM's data; not a flush of the DIMM."""


FLUSHES: Final = tuple(one for one in Operation if one is not Operation.LABEL)
"""Calls that may be a flush of a DIMM."""


class Injected(IntFlag):
    """Faults that the shim injected into a call; the values are those of flush_shim.c."""

    DELAYED = 1
    FAILED = 2
    HUNG = 4


_U32, _U64 = ctypes.c_uint32, ctypes.c_uint64


def _struct(*members: tuple[Any, str]) -> Any:
    """Build a C struct; each string names consecutive members of one type."""
    fields = [(name, kind) for kind, names in members for name in names.split()]
    return type("Struct", (ctypes.Structure,), {"_fields_": fields})


RULE = _struct(
    (_U32, "delay_mask delay_epoch delay_low_us delay_high_us"),
    (_U32, "fail_mask fail_epoch fail_errno fail_first fail_step fail_last"),
    (_U32, "hang_mask hang_epoch"),
)
_COUNTS = _struct((_U64, "begun ended failed in_flight most"))
_FILE = _struct(
    (_U64, "dev ino data"),
    (_U32, "generation released"),
    (RULE * 2, "rules"),
    (_U64, "drawn matched"),
    (_COUNTS * (len(Operation) + 1), "counts"),
    (_U64, "mapped"),
)
_RECORD = _struct(
    (_U64, "state begin_ns end_ns"),
    (_U32, "file operation injected delay_us result thread"),
    (_U64, "start end"),
)
PAGE = _struct(
    (_U64, "magic layout seed"),
    (ctypes.c_int64, "loaded"),
    (_U64, "lost files begun reserved"),
    (_FILE * FILES, "file"),
    (_RECORD * RECORDS, "records"),
)


def describe() -> tuple[str, int]:
    """Return C static assertions for the layout of flush_shim.c, and their digest."""
    assertions = {f"{item.name} == {item.value}" for item in (*Operation, *Injected)}
    structs = {"rule": RULE, "counts": _COUNTS, "file": _FILE, "record": _RECORD, "page": PAGE}
    for name, struct in structs.items():
        assertions.add(f"sizeof(struct {name}) == {ctypes.sizeof(struct)}")
        for member, _kind in struct._fields_:
            field = getattr(struct, member)
            assertions.add(f"offsetof(struct {name}, {member}) == {field.offset}")
            assertions.add(f"sizeof(((struct {name} *)0)->{member}) == {field.size}")
    lines = [f'_Static_assert({item}, "paprscm/vm/sync_shim.py");' for item in sorted(assertions)]
    digest = int.from_bytes(hashlib.sha256("\n".join(lines).encode()).digest()[:8], "big")
    lines += [f"#define MAGIC {MAGIC:#x}u", f"#define LAYOUT {digest:#x}u", ""]
    return "\n".join(lines), digest
