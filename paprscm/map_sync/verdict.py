# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports of guest_tools/map_sync.c, parsed strictly, and the verdicts that they prove."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final, Literal

from paprscm.guest.report import (
    Fields,
    Natural,
    ToolReport,
    check_errno,
    check_report,
    read_report,
)
from paprscm.vm.machine import Nvdimm

STATX_ATTR_DAX: Final = 0x00200000
MAP_SYNC: Final = 0x080000
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
UNKNOWN_BIT: Final = 0x02000000
"""Flag that map_sync's --unknown-bit sets."""

FILE_SYSTEMS: Final = {0x58465342: "xfs", 0xEF53: "ext4", 0x01021994: "tmpfs"}
"""statfs magic numbers (Linux include/uapi/linux/magic.h)."""

_TYPES: Final = {
    "shared": (0x01, "MAP_SHARED"),
    "private": (0x02, "MAP_PRIVATE"),
    "shared_validate": (0x03, "MAP_SHARED_VALIDATE"),
    "none": (0x00, None),
}


class MapResult(StrEnum):
    """Result of one mapping, and map_sync's exit status for it."""

    MAPPED = "mapped"
    REFUSED = "refused"
    SIGBUS = "sigbus"
    SIGSEGV = "sigsegv"
    ERROR = "error"


_STATUS: Final = {
    MapResult.MAPPED: 0,
    MapResult.REFUSED: 1,
    MapResult.SIGBUS: 3,
    MapResult.SIGSEGV: 3,
    MapResult.ERROR: 4,
}


class Statx(Fields, frozen=True, kw_only=True):
    """The answer of statx(2).

    Attributes:
        attributes, attributes_mask: stx_attributes and stx_attributes_mask.
        dax: the file is DAX, or is not; None: unknown.
    """

    attributes: Natural
    attributes_mask: Natural
    dax: bool | None

    def __post_init__(self) -> None:
        known = self.attributes_mask & STATX_ATTR_DAX
        dax = bool(self.attributes & STATX_ATTR_DAX) if known else None
        check_report(self.dax is dax, f"dax is {self.dax}, not {dax} as in the attributes")


class FileFacts(
    Fields,
    frozen=True,
    kw_only=True,
    rename={"size_bytes": "size", "fs_block_bytes": "fs_block_size"},
):
    """The file as it was before it was mapped.

    Attributes:
        type: its type.
        size_bytes: its size.
        statx: None if it failed, with `statx_errno`.
        fs_type: statfs's f_type, None if it failed.
        fs_block_bytes: statfs's f_bsize, None if it failed.
    """

    type: Literal["regular", "block", "character", "directory", "other"]
    size_bytes: Natural
    statx: Statx | None
    statx_errno: Natural | None
    statx_errno_name: str | None
    fs_type: Natural | None
    fs_block_bytes: Natural | None

    def __post_init__(self) -> None:
        check_errno(self.statx_errno, self.statx_errno_name)
        check_report((self.statx is None) == (self.statx_errno is not None), "statx and its errno")

    @property
    def dax(self) -> bool | None:
        """The file is DAX, or is not; None: unknown."""
        return self.statx.dax if self.statx else None

    @property
    def fs_name(self) -> str:
        """The file system's name, or its magic number."""
        if self.fs_type is None:
            return "an unknown file system"
        return FILE_SYSTEMS.get(self.fs_type, f"file system {self.fs_type:#x}")


class MappingFacts(Fields, frozen=True, kw_only=True):
    """One try to map the file, and to load or store once in each of its pages.

    Attributes:
        type, sync, unknown_bit, prot, offset, length: what was asked for; bytes.
        flags, flag_names: the same as mmap() got it.
        result, stage: how it went, and where it ended.
        errno, errno_name: of mmap() or of the failed step.
        fault_offset: where in the mapping SIGBUS or SIGSEGV came, bytes.
        vm_flags: the VmFlags of /proc/self/smaps; None if there were none.
        pages_accessed: pages that were loaded or stored to without a signal.
        first_access_ns: how long the first access, with its page fault, took, ns.
        store_in_mapping: all stores were read back through the mapping; None: none were made.
        store_in_file: all stores were found in the file by pread(); None: none made or no pread().
        pread_errno: why there was no pread().
    """

    type: Literal["shared", "shared_validate", "private", "none"]
    sync: bool
    unknown_bit: bool
    flags: Natural
    flag_names: tuple[str, ...]
    prot: Literal["rw", "r", "w", "none"]
    offset: Natural
    length: Natural
    result: MapResult
    stage: str
    errno: Natural | None
    errno_name: str | None
    fault_offset: Natural | None
    vm_flags: frozenset[str] | None
    pages_accessed: Natural
    first_access_ns: Natural | None
    store_in_mapping: bool | None
    store_in_file: bool | None
    pread_errno: Natural | None
    pread_errno_name: str | None

    def __post_init__(self) -> None:
        check_errno(self.errno, self.errno_name)
        check_errno(self.pread_errno, self.pread_errno_name)
        _check_flags(self)
        _check_outcome(self)

    def __str__(self) -> str:
        asked = "|".join(self.flag_names) or "no flag"
        if self.errno is not None:
            return f"{asked} {self.result} at {self.stage} with {self.errno_name} ({self.errno})"
        if self.fault_offset is not None:
            return f"{asked} {self.result} at {self.stage}, offset {self.fault_offset:#x}"
        flags = "unknown" if self.vm_flags is None else " ".join(sorted(self.vm_flags))
        return f"{asked} {self.result}, VmFlags {flags}"


class MapReport(ToolReport, frozen=True, kw_only=True):
    """The beginning of both kinds of report.

    Attributes:
        path: the file.
        page_size: of the guest's kernel, bytes.
        opened: how the file was open for the mapping.
        file: the file before it was mapped; None if it could not be opened.
        mapping: the mapping asked for.
    """

    tool: Literal["map_sync"]
    path: str
    page_size: Natural
    opened: Literal["rw", "r", "none"]
    file: FileFacts | None
    mapping: MappingFacts

    def __post_init__(self) -> None:
        size = self.page_size
        check_report(size >= 4096 and not size & (size - 1), f"page_size is {size}")


class _MapSyncLine(MapReport, frozen=True, kw_only=True):
    verb: Literal["map"]
    control: MappingFacts | None

    def __post_init__(self) -> None:
        super().__post_init__()
        mapping, control = self.mapping, self.control
        check_report(self.opened != "none", "no file was mapped")
        for name in ("MAP_ANONYMOUS", "MAP_FIXED"):
            check_report(name not in mapping.flag_names, f"{name} was not asked for")
        failed = mapping.result is MapResult.ERROR
        check_report(self.file is not None or (failed and control is None), "mapped without a file")
        if control is not None:
            kind = control.type, control.sync, control.unknown_bit, len(control.flag_names)
            check_report(kind == ("shared_validate", False, False, 1), "control is not a control")
            ranges = [(m.prot, m.offset, m.length) for m in (control, mapping)]
            check_report(ranges[0] == ranges[1], "control is of another range")

    @property
    def exit_status(self) -> int:
        return _STATUS[self.mapping.result]


class MapSyncReport(_MapSyncLine, frozen=True, kw_only=True):
    """Result of one run of map_sync.

    Attributes:
        control: MAP_SHARED_VALIDATE alone on the same range, made first; None if not asked for.
        stderr: map_sync's other output.
        line: the report as it came.
    """

    stderr: str
    line: str


def parse_map_sync(stdout: str, status: int, stderr: str = "") -> MapSyncReport:
    """Parse a report of map_sync; nothing in it may be missing, unknown or contradictory.

    Args:
        stdout: what it printed, one line of JSON.
        status: its exit status.
        stderr: kept with the report.

    Raises:
        ProbeError: with what is wrong, the status and stderr.
    """
    report = read_report(_MapSyncLine, stdout, status, stderr)
    fields = {name: getattr(report, name) for name in _MapSyncLine.__struct_fields__}
    return MapSyncReport(**fields, stderr=stderr, line=stdout.removesuffix("\n"))


class Verdict(Enum):
    """Verdict that a MAP_SYNC probe proves."""

    ACCEPTED = "MAP_SYNC accepted"
    REFUSED = "MAP_SYNC refused"
    NOT_DAX = "not DAX"
    BROKEN = "broken"


@dataclass(frozen=True)
class Judgement:
    """A verdict, and in words what it rests on."""

    verdict: Verdict
    reason: str

    def __str__(self) -> str:
        return f"{self.verdict.value}: {self.reason}"


def judge_map_sync(report: MapSyncReport) -> Judgement:
    """Say what a report proves; no errno alone, and no mapping alone, proves anything.

    NOT_DAX: statx says so, whatever mmap() said: the same EOPNOTSUPP as for a refused MAP_SYNC
    comes from every file that is not DAX (Linux include/linux/dax.h:daxdev_mapping_supported).
    ACCEPTED: on a DAX file, mapped, with `sf` in VmFlags, and each store found in the file.
    REFUSED: on a DAX file, EOPNOTSUPP, and the control mapping of the same range works.
    BROKEN: anything else.
    """
    file, mapping, control = report.file, report.mapping, report.control
    if file is None:
        return Judgement(Verdict.BROKEN, f"the file was not reached: {mapping}")
    if file.dax is None:
        return Judgement(Verdict.BROKEN, "statx does not say whether the file is DAX")
    where = (
        f"{file.fs_name} with blocks of {file.fs_block_bytes} bytes, "
        f"pages of {report.page_size} bytes"
    )
    if not file.dax:
        return Judgement(Verdict.NOT_DAX, f"statx says so ({where}); {mapping}")
    question = (mapping.type, mapping.sync, mapping.unknown_bit, mapping.prot, report.opened)
    if question != ("shared_validate", True, False, "rw", "rw"):
        return Judgement(Verdict.BROKEN, f"the question was another one: {mapping}")
    if control is not None and (problem := _flaw(control, report.page_size)):
        return Judgement(Verdict.BROKEN, f"the control mapping: {problem}")
    if mapping.result is MapResult.REFUSED and mapping.errno == errno.EOPNOTSUPP:
        if control is None:
            return Judgement(Verdict.BROKEN, f"{mapping}, but no control mapping was tried")
        return Judgement(Verdict.REFUSED, f"{mapping} on a DAX file ({where}); {control}")
    if problem := _flaw(mapping, report.page_size):
        return Judgement(Verdict.BROKEN, problem)
    return Judgement(Verdict.ACCEPTED, f"{mapping} on a DAX file ({where})")


def on_dax_file(nvdimm: Nvdimm) -> Verdict:
    """The contract for a DAX file on this DIMM (drivers/nvdimm/pmem.c, pmem_attach_disk)."""
    return Verdict.REFUSED if nvdimm.flushes_by_hcall else Verdict.ACCEPTED


def _flaw(mapping: MappingFacts, page_size: int) -> str | None:
    """Why this is no working mapping, stored to and read back; None if it is."""
    if mapping.result is not MapResult.MAPPED:
        return str(mapping)
    if mapping.vm_flags is None:
        return f"{mapping}: there is no VmFlags to prove it"
    if mapping.sync and "sf" not in mapping.vm_flags:
        return f"{mapping}: MAP_SYNC was granted, but sf is not in VmFlags"
    if not mapping.sync and "sf" in mapping.vm_flags:
        return f"{mapping}: sf is in VmFlags, but MAP_SYNC was not asked for"
    if not mapping.pages_accessed or mapping.pages_accessed != -(-mapping.length // page_size):
        return f"{mapping}: {mapping.pages_accessed} pages stored to, of {mapping.length} bytes"
    if not mapping.store_in_mapping:
        return f"{mapping}: a store was not read back through the mapping"
    if mapping.store_in_file is None:
        return f"{mapping}: the file could not be read back (errno {mapping.pread_errno})"
    if not mapping.store_in_file:
        return f"{mapping}: a store did not arrive in the file"
    return None


def _check_flags(mapping: MappingFacts) -> None:
    number, name = _TYPES[mapping.type]
    bits = [
        (number, name, bool(number)),
        (MAP_SYNC, "MAP_SYNC", mapping.sync),
        (UNKNOWN_BIT, "UNKNOWN_BIT", mapping.unknown_bit),
        (MAP_ANONYMOUS, "MAP_ANONYMOUS", "MAP_ANONYMOUS" in mapping.flag_names),
        (MAP_FIXED, "MAP_FIXED", "MAP_FIXED" in mapping.flag_names),
    ]
    flags = sum(bit for bit, _, there in bits if there)
    names = tuple(name for _, name, there in bits if there)
    check_report(
        (mapping.flags, mapping.flag_names) == (flags, names),
        f"flags are {mapping.flags:#x} {mapping.flag_names}, asked for were {flags:#x} {names}",
    )


def _check_outcome(mapping: MappingFacts) -> None:
    result = mapping.result
    signal = result in (MapResult.SIGBUS, MapResult.SIGSEGV)
    check_report(
        (mapping.errno is not None) == (result in (MapResult.REFUSED, MapResult.ERROR)),
        f"{result} with errno {mapping.errno}",
    )
    check_report((mapping.fault_offset is not None) == signal, f"{result} and fault_offset")
    check_report((result is MapResult.MAPPED) == (mapping.stage == "done"), f"{result} and stage")
    check_report((result is MapResult.REFUSED) == (mapping.stage == "mmap"), f"{result} and stage")
    if result is MapResult.REFUSED:
        nothing = (mapping.vm_flags, mapping.store_in_mapping, mapping.store_in_file)
        check_report(
            nothing == (None, None, None) and not mapping.pages_accessed, "refused, but accessed"
        )
    check_report(
        "w" in mapping.prot or (mapping.store_in_mapping, mapping.store_in_file) == (None, None),
        "a store that was not asked for",
    )
