# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports of guest_tools/map_sync.c, parsed strictly, and the MAP_SYNC verdicts they prove."""

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
        dax: True if the file is DAX; None: unknown.
    """

    attributes: Natural
    attributes_mask: Natural
    dax: bool | None

    def __post_init__(self) -> None:
        valid = self.attributes_mask & STATX_ATTR_DAX
        dax = bool(self.attributes & STATX_ATTR_DAX) if valid else None
        check_report(self.dax is dax, f"dax is {self.dax}, not {dax} as in the attributes")


class FileFacts(
    Fields,
    frozen=True,
    kw_only=True,
    rename={"size_bytes": "size", "fs_block_bytes": "fs_block_size"},
):
    """The file before the mapping.

    Attributes:
        type: its type.
        size_bytes: its size.
        statx: result of statx(2); None if it failed, with `statx_errno`.
        fs_type: f_type of statfs(2); None if it failed.
        fs_block_bytes: f_bsize of statfs(2); None if it failed.
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
        """True if the file is DAX; None: unknown."""
        return self.statx.dax if self.statx else None

    @property
    def fs_name(self) -> str:
        """The file system's name, or its magic number."""
        if self.fs_type is None:
            return "an unknown file system"
        return FILE_SYSTEMS.get(self.fs_type, f"file system {self.fs_type:#x}")


class MappingFacts(Fields, frozen=True, kw_only=True):
    """One attempt to map the file, with one load or store in each of its pages.

    Attributes:
        type, sync, unknown_bit, prot, offset, length: the request; bytes.
        flags, flag_names: the flags as passed to mmap().
        result, stage: the result, and the last step.
        errno, errno_name: of mmap() or of the failed step.
        fault_offset: offset in the mapping of a SIGBUS or SIGSEGV, bytes.
        vm_flags: VmFlags in /proc/self/smaps; None if there were none.
        pages_accessed: number of pages accessed without a signal.
        first_access_ns: duration of the first access, with its page fault, ns.
        store_in_mapping: all stores were read back through the mapping; None: no stores.
        store_in_file: all stores were read back by pread(); None: no stores, or no pread().
        pread_errno: errno of a failed pread().
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
        request = "|".join(self.flag_names) or "no flag"
        if self.errno is not None:
            return f"{request} {self.result} at {self.stage} with {self.errno_name} ({self.errno})"
        if self.fault_offset is not None:
            return f"{request} {self.result} at {self.stage}, offset {self.fault_offset:#x}"
        flags = "unknown" if self.vm_flags is None else " ".join(sorted(self.vm_flags))
        return f"{request} {self.result}, VmFlags {flags}"


class MapReport(ToolReport, frozen=True, kw_only=True):
    """Common fields of both kinds of report.

    Attributes:
        path: the file.
        page_size: page size of the guest's kernel, bytes.
        opened: open mode of the file for the mapping.
        file: the file before the mapping; None if it could not be opened.
        mapping: the requested mapping.
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
            check_report(name not in mapping.flag_names, f"{name} was not requested")
        failed = mapping.result is MapResult.ERROR
        check_report(self.file is not None or (failed and control is None), "mapped without a file")
        if control is not None:
            kind = control.type, control.sync, control.unknown_bit, len(control.flag_names)
            check_report(
                kind == ("shared_validate", False, False, 1), "the control mapping has other flags"
            )
            ranges = [(m.prot, m.offset, m.length) for m in (control, mapping)]
            check_report(ranges[0] == ranges[1], "the control mapping has another range")

    @property
    def exit_status(self) -> int:
        return _STATUS[self.mapping.result]


class MapSyncReport(_MapSyncLine, frozen=True, kw_only=True):
    """Result of one run of map_sync.

    Attributes:
        control: MAP_SHARED_VALIDATE alone on the same range, tried first; None if not requested.
        stderr: other output of map_sync.
        line: the unparsed report.
    """

    stderr: str
    line: str


def parse_map_sync(stdout: str, status: int, stderr: str = "") -> MapSyncReport:
    """Parse a report of map_sync; no field may be missing, unknown or contradictory.

    Args:
        stdout: one line of JSON.
        status: exit status of map_sync.
        stderr: other output, kept with the report.

    Raises:
        ProbeError: the report is invalid; with the reason, the status and stderr.
    """
    report = read_report(_MapSyncLine, stdout, status, stderr)
    fields = {name: getattr(report, name) for name in _MapSyncLine.__struct_fields__}
    return MapSyncReport(**fields, stderr=stderr, line=stdout.removesuffix("\n"))


class Verdict(Enum):
    """Verdict of a MAP_SYNC probe."""

    ACCEPTED = "MAP_SYNC accepted"
    REFUSED = "MAP_SYNC refused"
    NOT_DAX = "not DAX"
    BROKEN = "broken"


@dataclass(frozen=True)
class Judgement:
    """A verdict and its reason."""

    verdict: Verdict
    reason: str

    def __str__(self) -> str:
        return f"{self.verdict.value}: {self.reason}"


def judge_map_sync(report: MapSyncReport) -> Judgement:
    """Return the verdict that a report proves; neither an errno nor a mapping alone is a proof.

    NOT_DAX: according to statx, regardless of mmap(): every file that is not DAX fails with the
    same EOPNOTSUPP as a refused MAP_SYNC (Linux include/linux/dax.h:daxdev_mapping_supported).
    ACCEPTED: a DAX file, mapped, with `sf` in VmFlags, and each store is in the file.
    REFUSED: a DAX file, EOPNOTSUPP, and the control mapping of the same range works.
    BROKEN: anything else.
    """
    file, mapping, control = report.file, report.mapping, report.control
    if file is None:
        return Judgement(Verdict.BROKEN, f"the file could not be opened: {mapping}")
    if file.dax is None:
        return Judgement(Verdict.BROKEN, "statx does not report whether the file is DAX")
    setting = (
        f"{file.fs_name} with blocks of {file.fs_block_bytes} bytes, "
        f"pages of {report.page_size} bytes"
    )
    if not file.dax:
        return Judgement(Verdict.NOT_DAX, f"statx reports no DAX ({setting}); {mapping}")
    question = (mapping.type, mapping.sync, mapping.unknown_bit, mapping.prot, report.opened)
    if question != ("shared_validate", True, False, "rw", "rw"):
        return Judgement(Verdict.BROKEN, f"the probe did not ask for MAP_SYNC: {mapping}")
    if control is not None and (problem := _flaw(control, report.page_size)):
        return Judgement(Verdict.BROKEN, f"the control mapping: {problem}")
    if mapping.result is MapResult.REFUSED and mapping.errno == errno.EOPNOTSUPP:
        if control is None:
            return Judgement(Verdict.BROKEN, f"{mapping}, but no control mapping was tried")
        return Judgement(Verdict.REFUSED, f"{mapping} on a DAX file ({setting}); {control}")
    if problem := _flaw(mapping, report.page_size):
        return Judgement(Verdict.BROKEN, problem)
    return Judgement(Verdict.ACCEPTED, f"{mapping} on a DAX file ({setting})")


def on_dax_file(nvdimm: Nvdimm) -> Verdict:
    """The contract for a DAX file on this DIMM (drivers/nvdimm/pmem.c, pmem_attach_disk)."""
    return Verdict.REFUSED if nvdimm.flushes_by_hcall else Verdict.ACCEPTED


def _flaw(mapping: MappingFacts, page_size: int) -> str | None:
    """Reason why this mapping does not work, with stores read back; None if it works."""
    if mapping.result is not MapResult.MAPPED:
        return str(mapping)
    if mapping.vm_flags is None:
        return f"{mapping}: no VmFlags to prove it"
    if mapping.sync and "sf" not in mapping.vm_flags:
        return f"{mapping}: MAP_SYNC was granted, but sf is not in VmFlags"
    if not mapping.sync and "sf" in mapping.vm_flags:
        return f"{mapping}: sf is in VmFlags, but MAP_SYNC was not requested"
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
    flags = sum(bit for bit, _, is_set in bits if is_set)
    names = tuple(name for _, name, is_set in bits if is_set)
    check_report(
        (mapping.flags, mapping.flag_names) == (flags, names),
        f"flags are {mapping.flags:#x} {mapping.flag_names}, requested were {flags:#x} {names}",
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
        "a store that was not requested",
    )
