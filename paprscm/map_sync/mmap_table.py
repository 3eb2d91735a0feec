# SPDX-License-Identifier: GPL-2.0-or-later
"""Combinations of mmap() flags with MAP_SYNC, and the result of each on Linux.

The table has the results of Linux up to now. A result according to mmap(2) is also accepted
(`as_documented`), where the two differ:
* Linux does not ignore MAP_SYNC with MAP_SHARED and MAP_PRIVATE: do_mmap() (mm/mmap.c) computes
  VM_SYNC (calc_vm_flag_bits) before it masks the flags of MAP_SHARED, and does not check those of
  MAP_PRIVATE. On tmpfs and block devices VmFlags then contain `sf`, which guarantees nothing there.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from paprscm.map_sync.mmap_report import Access, Cell, CellReport
from paprscm.map_sync.verdict import MappingFacts, MapResult


class FileKind(Enum):
    """Kinds of files with different results; the values are columns of the table."""

    GRANTS = 0
    """A DAX file on a synchronous device."""
    REFUSES = 1
    """A file of a file system with DAX: not DAX itself, or on an asynchronous device."""
    UNAWARE = 2
    """A file whose f_op has no FOP_MMAP_SYNC: tmpfs, a block device."""
    DEVICE = 3
    """A devdax device."""


# --- the table ------------------------------------------------------------------------------------

# Result of mmap(): mapped, mapped with sf in VmFlags, or an errno.
OK: Final = 0
SF: Final = -1
MmapAnswer = int

_RULES: Final = {
    "no type": "mm/mmap.c:do_mmap, switch (flags & MAP_TYPE): the default is EINVAL",
    "validate": "mm/mmap.c:do_mmap, MAP_SHARED_VALIDATE: EOPNOTSUPP for a flag that is not in "
    "LEGACY_MAP_MASK, except MAP_SYNC if f_op has FOP_MMAP_SYNC; before the access is checked",
    "shared": "mm/mmap.c:do_mmap, MAP_SHARED: flags that are not in LEGACY_MAP_MASK are dropped",
    "private": "mm/mmap.c:do_mmap, MAP_PRIVATE: no flag is checked, FMODE_READ is enough; "
    "drivers/dax/device.c:check_vma requires VM_MAYSHARE",
    "write": "mm/mmap.c:do_mmap, MAP_SHARED and MAP_SHARED_VALIDATE: EACCES for PROT_WRITE "
    "without FMODE_WRITE; before the file system's mmap()",
    "sync": "include/linux/mman.h:calc_vm_flag_bits sets VM_SYNC for MAP_SYNC with every type; "
    "xfs_file_mmap and ext4_file_mmap call include/linux/dax.h:daxdev_mapping_supported; "
    "mm/shmem.c:shmem_mmap, block/fops.c:blkdev_mmap and drivers/dax/device.c:dax_mmap do not",
    "anonymous": "mm/mmap.c:do_mmap, no file: MAP_SHARED and MAP_PRIVATE only, else EINVAL",
    "alignment": "drivers/dax/device.c:check_vma: EINVAL unless the mapping begins and ends at "
    "multiples of the device's alignment",
    "length": "mm/mmap.c:do_mmap: EINVAL for length 0",
    "offset": "arch/powerpc/kernel/syscalls.c:do_mmap2: EINVAL unless it is in whole pages",
}


@dataclass(frozen=True)
class _Row:
    """Results for each kind of file, in the order of FileKind."""

    type: str
    sync: bool
    unknown_bit: bool
    accesses: tuple[Access, ...]
    answers: tuple[MmapAnswer, MmapAnswer, MmapAnswer, MmapAnswer]
    rule: str


_NONE, _SHARED, _VALIDATE, _PRIVATE = "none", "shared", "shared_validate", "private"
_ALL: Final = tuple(Access)
_OPEN: Final = (Access.READ_WRITE, Access.READ)
_SHUT: Final = (Access.WRITE,)
_NOTSUPP, _ACCES, _INVAL = errno.EOPNOTSUPP, errno.EACCES, errno.EINVAL
# Not errno.errorcode, which has ENOTSUP for the first.
_NAMES: Final = {_NOTSUPP: "EOPNOTSUPP", _ACCES: "EACCES", _INVAL: "EINVAL"}

# fmt: off
_TABLE: Final = (
    #    type     sync  unknown access  GRANTS     REFUSES    UNAWARE    DEVICE      rule
    _Row(_NONE, False, False, _ALL,  (_INVAL,    _INVAL,    _INVAL,    _INVAL),    "no type"),
    _Row(_NONE, True, False, _ALL,   (_INVAL,    _INVAL,    _INVAL,    _INVAL),    "no type"),
    _Row(_NONE, False, True, _ALL,   (_INVAL,    _INVAL,    _INVAL,    _INVAL),    "no type"),
    _Row(_NONE, True, True, _ALL,    (_INVAL,    _INVAL,    _INVAL,    _INVAL),    "no type"),

    _Row(_VALIDATE, False, False, _OPEN, (OK,    OK,        OK,        OK),        "validate"),
    _Row(_VALIDATE, False, False, _SHUT, (_ACCES, _ACCES,   _ACCES,    _ACCES),    "write"),
    _Row(_VALIDATE, True, False, _OPEN,  (SF,    _NOTSUPP,  _NOTSUPP,  SF),        "sync"),
    _Row(_VALIDATE, True, False, _SHUT,  (_ACCES, _ACCES,   _NOTSUPP,  _ACCES),    "write"),
    _Row(_VALIDATE, False, True, _ALL, (_NOTSUPP, _NOTSUPP, _NOTSUPP,  _NOTSUPP),  "validate"),
    _Row(_VALIDATE, True, True, _ALL,  (_NOTSUPP, _NOTSUPP, _NOTSUPP,  _NOTSUPP),  "validate"),

    _Row(_SHARED, False, False, _OPEN, (OK,      OK,        OK,        OK),        "shared"),
    _Row(_SHARED, False, False, _SHUT, (_ACCES,  _ACCES,    _ACCES,    _ACCES),    "write"),
    _Row(_SHARED, True, False, _OPEN,  (SF,      _NOTSUPP,  SF,        SF),        "sync"),
    _Row(_SHARED, True, False, _SHUT,  (_ACCES,  _ACCES,    _ACCES,    _ACCES),    "write"),
    _Row(_SHARED, False, True, _OPEN,  (OK,      OK,        OK,        OK),        "shared"),
    _Row(_SHARED, False, True, _SHUT,  (_ACCES,  _ACCES,    _ACCES,    _ACCES),    "write"),
    _Row(_SHARED, True, True, _OPEN,   (SF,      _NOTSUPP,  SF,        SF),        "sync"),
    _Row(_SHARED, True, True, _SHUT,   (_ACCES,  _ACCES,    _ACCES,    _ACCES),    "write"),

    _Row(_PRIVATE, False, False, _ALL, (OK,      OK,        OK,        _INVAL),    "private"),
    _Row(_PRIVATE, True, False, _ALL,  (SF,      _NOTSUPP,  SF,        _INVAL),    "sync"),
    _Row(_PRIVATE, False, True, _ALL,  (OK,      OK,        OK,        _INVAL),    "private"),
    _Row(_PRIVATE, True, True, _ALL,   (SF,      _NOTSUPP,  SF,        _INVAL),    "sync"),
)
# fmt: on

# VmFlags that do_mmap() sets for type, protection and open mode, among the judged flags: without
# FMODE_WRITE a shared mapping has neither "sh" nor "mw", but "ms".
_JUDGED_FLAGS: Final = frozenset({"rd", "wr", "sh", "mr", "mw", "ms", "sf"})
_VM_FLAGS: Final = {
    (True, Access.READ_WRITE): frozenset({"rd", "wr", "sh", "mr", "mw", "ms"}),
    (True, Access.READ): frozenset({"rd", "mr", "ms"}),
    (False, Access.READ_WRITE): frozenset({"rd", "wr", "mr", "mw"}),
    (False, Access.WRITE): frozenset({"rd", "wr", "mr", "mw"}),
    (False, Access.READ): frozenset({"rd", "mr", "mw"}),
}

CELLS: Final = tuple(
    Cell(type=row.type, sync=row.sync, unknown_bit=row.unknown_bit, access=access)
    for row in _TABLE
    for access in row.accesses
)
"""All types, with and without MAP_SYNC and an unknown flag, in each access."""

RANGES: Final = (
    Cell(type=_VALIDATE, sync=True, length=1),
    Cell(type=_VALIDATE, length=0),
    # Neither a multiple of 4 KiB nor of 64 KiB.
    Cell(type=_VALIDATE, offset=512, length=1),
)
"""Ranges that are not whole pages, for files without an alignment of mappings."""

ANONYMOUS: Final = (
    Cell(type=_VALIDATE, anonymous=True),
    Cell(type=_VALIDATE, sync=True, anonymous=True),
    Cell(type=_SHARED, anonymous=True),
    Cell(type=_SHARED, sync=True, anonymous=True),
)
"""Anonymous mappings."""


def expected_answer(cell: Cell, kind: FileKind) -> tuple[MmapAnswer, str]:
    """Return the expected result of a cell (OK, SF or an errno) and the name of its rule."""
    if cell.length == 0:
        return _INVAL, "length"
    if cell.offset % 4096:
        return _INVAL, "offset"
    if cell.anonymous:
        if cell.type in (_SHARED, _PRIVATE):
            return (SF if cell.sync else OK), "anonymous"
        return _INVAL, "anonymous"
    key = cell.type, cell.sync, cell.unknown_bit
    row = next(
        row
        for row in _TABLE
        if (row.type, row.sync, row.unknown_bit) == key and cell.access in row.accesses
    )
    return row.answers[kind.value], row.rule


def at_offsets(cells: Iterable[Cell], step_bytes: int) -> tuple[Cell, ...]:
    """The same cells with consecutive ranges of `step_bytes`."""
    return tuple(
        dataclasses.replace(cell, offset=number * step_bytes, length=step_bytes)
        for number, cell in enumerate(cells)
    )


# --- comparison -----------------------------------------------------------------------------------


def table_differences(
    reports: Iterable[CellReport], kind: FileKind, *, align_bytes: int = 1
) -> list[str]:
    """A sentence for each cell whose result differs from the table.

    Args:
        reports: the results of the cells.
        kind: the kind of the file.
        align_bytes: alignment of a devdax device, bytes.
    """
    differences = []
    for report in reports:
        answer, rule = expected_answer(report.cell, kind)
        if answer in (OK, SF) and report.mapped_bytes % align_bytes:
            answer, rule = _INVAL, "alignment"
        problem = _difference(report, answer, kind)
        if problem and not _is_as_documented(report, kind):
            differences.append(f"{report.cell}: {problem} ({_RULES[rule]})")
    return differences


def as_documented(reports: Iterable[CellReport], kind: FileKind) -> list[str]:
    """The cells whose results follow mmap(2) instead of the table."""
    return [
        str(report.cell)
        for report in reports
        if _difference(report, expected_answer(report.cell, kind)[0], kind)
        and _is_as_documented(report, kind)
    ]


def _is_as_documented(report: CellReport, kind: FileKind) -> bool:
    """Return True if MAP_SHARED or MAP_PRIVATE ignored MAP_SYNC, as documented."""
    ignores = report.cell.type in (_SHARED, _PRIVATE) and report.cell.sync
    answer, _rule = expected_answer(dataclasses.replace(report.cell, sync=False), kind)
    return ignores and _difference(report, answer, kind) is None


def _difference(report: CellReport, answer: MmapAnswer, kind: FileKind) -> str | None:
    cell, mapping = report.cell, report.mapping
    outcome = _outcome(mapping)
    if answer not in (OK, SF):
        refused = mapping.result is MapResult.REFUSED and mapping.errno == answer
        return None if refused else f"expected {_NAMES[answer]}, found {outcome}"
    if mapping.result is not MapResult.MAPPED:
        return f"expected mapped{' with sf' if answer == SF else ''}, found {outcome}"
    shared = cell.type != _PRIVATE
    vm_flags = _VM_FLAGS[shared, cell.access] | ({"sf"} if answer == SF else set())
    if mapping.vm_flags is None or mapping.vm_flags & _JUDGED_FLAGS != vm_flags:
        return f"expected mapped, VmFlags {' '.join(sorted(vm_flags))}, found {outcome}"
    pages = report.mapped_bytes // report.page_size
    if mapping.pages_accessed != pages:
        return f"expected {pages} pages accessed, found {mapping.pages_accessed}"
    return _store_difference(report, kind, shared)


def _store_difference(report: CellReport, kind: FileKind, shared: bool) -> str | None:
    """Description of a wrong destination of the stores, or None."""
    mapping = report.mapping
    stores = (mapping.store_in_mapping, mapping.store_in_file)
    if report.cell.access is Access.READ:
        return (
            None if stores == (None, None) else f"stores in a mapping without PROT_WRITE: {stores}"
        )
    if not mapping.store_in_mapping:
        return "a store was not read back through the mapping"
    if report.cell.anonymous:
        return None if mapping.store_in_file is None else "a store went to a file"
    if kind is FileKind.DEVICE:
        # drivers/dax/device.c, dax_fops: no read; fs/read_write.c:vfs_read returns EINVAL.
        if mapping.pread_errno == errno.EINVAL:
            return None
        return f"expected pread() to fail with EINVAL, found {mapping.pread_errno}"
    if mapping.store_in_file is None:
        return f"the file could not be read back (errno {mapping.pread_errno})"
    if mapping.store_in_file is not shared:
        return f"a store is {'not ' if shared else ''}in the file"
    return None


def _outcome(mapping: MappingFacts) -> str:
    if mapping.errno_name is not None:
        if mapping.result is MapResult.REFUSED:
            return mapping.errno_name
        return f"{mapping.result} at {mapping.stage} with {mapping.errno_name}"
    if mapping.fault_offset is not None:
        return f"{mapping.result} at {mapping.stage}, offset {mapping.fault_offset:#x}"
    flags = "unknown" if mapping.vm_flags is None else " ".join(sorted(mapping.vm_flags))
    return f"{mapping.result}, VmFlags {flags}"
