# SPDX-License-Identifier: GPL-2.0-or-later
"""What guest_tools/map_sync.c reports, parsed strictly, and what such a report proves."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final

from paprscm.guest.report import (
    Fields,
    MalformedError,
    load_line,
    parse_errno,
    parse_path,
    unbelievable,
)
from paprscm.vm.machine import Nvdimm

STATX_ATTR_DAX: Final = 0x00200000
MAP_SYNC: Final = 0x080000
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
UNKNOWN_BIT: Final = 0x02000000
"""What map_sync's --unknown-bit sets."""

FILE_SYSTEMS: Final = {0x58465342: "xfs", 0xEF53: "ext4", 0x01021994: "tmpfs"}
"""statfs magic numbers (Linux include/uapi/linux/magic.h)."""

_TYPES: Final = {
    "shared": (0x01, "MAP_SHARED"),
    "private": (0x02, "MAP_PRIVATE"),
    "shared_validate": (0x03, "MAP_SHARED_VALIDATE"),
    "none": (0x00, None),
}


class Result(StrEnum):
    """How one mapping went, and the exit status that map_sync gives it."""

    MAPPED = "mapped"
    REFUSED = "refused"
    SIGBUS = "sigbus"
    SIGSEGV = "sigsegv"
    ERROR = "error"


_STATUS: Final = {
    Result.MAPPED: 0,
    Result.REFUSED: 1,
    Result.SIGBUS: 3,
    Result.SIGSEGV: 3,
    Result.ERROR: 4,
}


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """The file as it was before it was mapped.

    Attributes:
        type: "regular", "block", "character", "directory" or "other".
        size_bytes: its size.
        attributes, attributes_mask: statx's stx_attributes and stx_attributes_mask; None where the
            kernel has no statx (its errno is in `statx_errno` then).
        dax: statx says that the file is DAX, that it is not, or (None) that it does not know.
        fs_type: statfs's f_type, None if it failed.
        fs_block_bytes: statfs's f_bsize, None if it failed.
    """

    type: str
    size_bytes: int
    attributes: int | None
    attributes_mask: int | None
    dax: bool | None
    statx_errno: int | None
    fs_type: int | None
    fs_block_bytes: int | None

    @property
    def fs_name(self) -> str:
        """The file system's name, or its magic number."""
        if self.fs_type is None:
            return "an unknown file system"
        return FILE_SYSTEMS.get(self.fs_type, f"file system {self.fs_type:#x}")


@dataclass(frozen=True, kw_only=True)
class Mapping:
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

    type: str
    sync: bool
    unknown_bit: bool
    flags: int
    flag_names: tuple[str, ...]
    prot: str
    offset: int
    length: int
    result: Result
    stage: str
    errno: int | None
    errno_name: str | None
    fault_offset: int | None
    vm_flags: frozenset[str] | None
    pages_accessed: int
    first_access_ns: int | None
    store_in_mapping: bool | None
    store_in_file: bool | None
    pread_errno: int | None

    def __str__(self) -> str:
        asked = "|".join(self.flag_names) or "no flag"
        if self.errno is not None:
            return f"{asked} {self.result} at {self.stage} with {self.errno_name} ({self.errno})"
        if self.fault_offset is not None:
            return f"{asked} {self.result} at {self.stage}, offset {self.fault_offset:#x}"
        flags = "unknown" if self.vm_flags is None else " ".join(sorted(self.vm_flags))
        return f"{asked} {self.result}, VmFlags {flags}"


@dataclass(frozen=True, kw_only=True)
class MapSyncReport:
    """What one run of map_sync found out.

    Attributes:
        path: the file.
        page_size: of the guest's kernel, bytes.
        opened: "rw" or "r", how the file was open for the mapping.
        file: what was known of it beforehand; None if it could not be opened.
        control: MAP_SHARED_VALIDATE alone on the same range, made first; None if not asked for.
        mapping: the mapping asked for.
        stderr: what map_sync printed there.
        line: the report as it came.
    """

    path: str
    page_size: int
    opened: str
    file: FileFacts | None
    control: Mapping | None
    mapping: Mapping
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
    try:
        return _report(load_line(stdout), stdout.removesuffix("\n"), status, stderr)
    except MalformedError as error:
        raise unbelievable("map_sync", error, stdout, status, stderr) from error


class Verdict(Enum):
    """What a MAP_SYNC probe proves."""

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


def judge(report: MapSyncReport) -> Judgement:
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
    if mapping.result is Result.REFUSED and mapping.errno == errno.EOPNOTSUPP:
        if control is None:
            return Judgement(Verdict.BROKEN, f"{mapping}, but no control mapping was tried")
        return Judgement(Verdict.REFUSED, f"{mapping} on a DAX file ({where}); {control}")
    if problem := _flaw(mapping, report.page_size):
        return Judgement(Verdict.BROKEN, problem)
    return Judgement(Verdict.ACCEPTED, f"{mapping} on a DAX file ({where})")


def on_dax_file(nvdimm: Nvdimm) -> Verdict:
    """The contract for a DAX file on this DIMM (drivers/nvdimm/pmem.c, pmem_attach_disk)."""
    return Verdict.REFUSED if nvdimm.flushes_by_hcall else Verdict.ACCEPTED


def _flaw(mapping: Mapping, page_size: int) -> str | None:
    """Why this is no working mapping, stored to and read back; None if it is."""
    if mapping.result is not Result.MAPPED:
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


def _report(fields: Fields, line: str, status: int, stderr: str) -> MapSyncReport:
    fields.require(fields.take("probe", str) == "map_sync", "not map_sync's")
    fields.require(fields.take("version", int) == 1, "of another version")
    file, control = fields.optional("file", dict), fields.optional("control", dict)
    report = MapSyncReport(
        path=parse_path(fields.take("path", str)),
        page_size=fields.take("page_size", int),
        opened=fields.take("opened", str),
        file=None if file is None else parse_file(Fields(file, "file")),
        control=None if control is None else parse_mapping(Fields(control, "control")),
        mapping=parse_mapping(Fields(fields.take("mapping", dict), "mapping")),
        stderr=stderr,
        line=line,
    )
    fields.done()
    size, mapping = report.page_size, report.mapping
    fields.require(size >= 4096 and not size & (size - 1), f"page_size is {size}")
    fields.require(report.opened in ("rw", "r"), f"opened is {report.opened!r}")
    fields.require(
        status == _STATUS[mapping.result], f"{mapping.result} does not end with status {status}"
    )
    if report.file is None:
        fields.require(
            mapping.result is Result.ERROR and report.control is None, "a mapping without a file"
        )
    if report.control is not None:
        kind = report.control.type, report.control.sync, report.control.unknown_bit
        fields.require(kind == ("shared_validate", False, False), "control is no control")
        ranges = [(m.prot, m.offset, m.length) for m in (report.control, mapping)]
        fields.require(ranges[0] == ranges[1], "control is of another range")
    return report


def parse_file(fields: Fields) -> FileFacts:
    """What a report says of the file.

    Raises:
        MalformedError: it contradicts itself; so do the other parse functions.
    """
    statx = fields.optional("statx", dict)
    attributes = mask = said = None
    if statx is not None:
        inner = Fields(statx, "file.statx")
        attributes, mask = inner.take("attributes", int), inner.take("attributes_mask", int)
        said = inner.optional("dax", bool)
        inner.done()
        dax = bool(attributes & STATX_ATTR_DAX) if mask & STATX_ATTR_DAX else None
        inner.require(said is dax, f"dax is {said}, the attributes say {dax}")
    facts = FileFacts(
        type=fields.take("type", str),
        size_bytes=fields.take("size", int),
        attributes=attributes,
        attributes_mask=mask,
        dax=said,
        statx_errno=parse_errno(fields, "statx_errno")[0],
        fs_type=fields.optional("fs_type", int),
        fs_block_bytes=fields.optional("fs_block_size", int),
    )
    fields.done()
    fields.require((statx is None) == (facts.statx_errno is not None), "statx and its errno")
    return facts


def parse_mapping(fields: Fields, *, anonymous: bool = False, fixed: bool = False) -> Mapping:
    """What a report says of one mapping; of no file if `anonymous`, with MAP_FIXED if `fixed`."""
    result = fields.take("result", str)
    fields.require(result in list(Result), f"result is {result!r}")
    number, name = parse_errno(fields, "errno")
    vm_flags = fields.optional("vm_flags", list)
    fields.require(all(isinstance(flag, str) for flag in vm_flags or ()), "vm_flags are no words")
    mapping = Mapping(
        type=fields.take("type", str),
        sync=fields.take("sync", bool),
        unknown_bit=fields.take("unknown_bit", bool),
        flags=fields.take("flags", int),
        flag_names=tuple(fields.take("flag_names", list)),
        prot=fields.take("prot", str),
        offset=fields.take("offset", int),
        length=fields.take("length", int),
        result=Result(result),
        stage=fields.take("stage", str),
        errno=number,
        errno_name=name,
        fault_offset=fields.optional("fault_offset", int),
        vm_flags=None if vm_flags is None else frozenset(vm_flags),
        pages_accessed=fields.take("pages_accessed", int),
        first_access_ns=fields.optional("first_access_ns", int),
        store_in_mapping=fields.optional("store_in_mapping", bool),
        store_in_file=fields.optional("store_in_file", bool),
        pread_errno=parse_errno(fields, "pread_errno")[0],
    )
    fields.done()
    _check_flags(fields, mapping, anonymous, fixed)
    _check_outcome(fields, mapping)
    return mapping


def _check_flags(fields: Fields, mapping: Mapping, anonymous: bool, fixed: bool) -> None:
    fields.require(mapping.type in _TYPES, f"type is {mapping.type!r}")
    fields.require(mapping.prot in ("rw", "r", "w", "none"), f"prot is {mapping.prot!r}")
    bits = [
        (*_TYPES[mapping.type], bool(_TYPES[mapping.type][0])),
        (MAP_SYNC, "MAP_SYNC", mapping.sync),
        (UNKNOWN_BIT, "UNKNOWN_BIT", mapping.unknown_bit),
        (MAP_ANONYMOUS, "MAP_ANONYMOUS", anonymous),
        (MAP_FIXED, "MAP_FIXED", fixed),
    ]
    flags = sum(bit for bit, _, there in bits if there)
    names = tuple(name for _, name, there in bits if there)
    fields.require(
        (mapping.flags, mapping.flag_names) == (flags, names),
        f"flags are {mapping.flags:#x} {mapping.flag_names}, asked for were {flags:#x} {names}",
    )


def _check_outcome(fields: Fields, mapping: Mapping) -> None:
    result = mapping.result
    signal = result in (Result.SIGBUS, Result.SIGSEGV)
    fields.require(
        (mapping.errno is not None) == (result in (Result.REFUSED, Result.ERROR)),
        f"{result} with errno {mapping.errno}",
    )
    fields.require((mapping.fault_offset is not None) == signal, f"{result} and fault_offset")
    fields.require((result is Result.MAPPED) == (mapping.stage == "done"), f"{result} and stage")
    fields.require((result is Result.REFUSED) == (mapping.stage == "mmap"), f"{result} and stage")
    if result is Result.REFUSED:
        nothing = (mapping.vm_flags, mapping.store_in_mapping, mapping.store_in_file)
        fields.require(
            nothing == (None, None, None) and not mapping.pages_accessed, "refused, but accessed"
        )
    fields.require(
        "w" in mapping.prot or (mapping.store_in_mapping, mapping.store_in_file) == (None, None),
        "a store that was not asked for",
    )
