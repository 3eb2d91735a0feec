# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports of map_sync --cell, one mmap() call each, parsed strictly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

from paprscm.guest.report import (
    Natural,
    check_errno,
    check_report,
    malformed_as_probe_error,
    mix,
    read_line,
)
from paprscm.map_sync.verdict import FileFacts, MappingFacts, MapReport, MapResult

_MASK: Final = (1 << 64) - 1


class Access(Enum):
    """Open mode and protection: `opened` and `prot` of a report, and a description."""

    READ_WRITE = ("rw", "rw", "")
    WRITE = ("r", "rw", " on O_RDONLY with PROT_WRITE")
    READ = ("r", "r", " on O_RDONLY with PROT_READ")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One mapping to try.

    Attributes:
        type: "shared", "shared_validate", "private" or "none".
        sync, unknown_bit: with MAP_SYNC; with a flag that no kernel defines.
        access: open mode and protection.
        anonymous: no file is mapped.
        offset, length: the range, bytes; None: to the end of the file, at least a page.
        fsync: fsync() the file afterwards.
        address_align: map it (MAP_FIXED) at a free address that is a multiple of this, bytes;
            None: the kernel chooses.
    """

    type: str
    sync: bool = False
    unknown_bit: bool = False
    access: Access = Access.READ_WRITE
    anonymous: bool = False
    offset: int = 0
    length: int | None = None
    fsync: bool = False
    address_align: int | None = None

    @property
    def words(self) -> str:
        """The argument of map_sync --cell."""
        opened, prot, _ = self.access.value
        words = [self.type, f"prot={prot}", f"offset={self.offset}"]
        words += ["sync"] * self.sync + ["unknown-bit"] * self.unknown_bit
        words += ["read-only"] * (opened == "r") + ["anonymous"] * self.anonymous
        words += ["fsync"] * self.fsync
        words += [] if self.length is None else [f"length={self.length}"]
        words += [] if self.address_align is None else [f"address-align={self.address_align}"]
        return ",".join(words)

    def __str__(self) -> str:
        flags = [f"MAP_{self.type.upper()}"] if self.type != "none" else []
        flags += ["MAP_SYNC"] * self.sync + ["UNKNOWN_BIT"] * self.unknown_bit
        flags += ["MAP_ANONYMOUS"] * self.anonymous
        flags += ["MAP_FIXED"] * (self.address_align is not None)
        text = ("|".join(flags) or "no flag") + self.access.value[2]
        text += f", offset {self.offset:#x}" if self.offset else ""
        return text if self.length is None else f"{text}, length {self.length:#x}"


@dataclass(frozen=True, kw_only=True)
class CellReport:
    """Result of one cell.

    Attributes:
        cell: the request.
        page_size: page size of the guest's kernel, bytes.
        file: the file just before mmap(); None if no file was opened.
        mapping: the mapping.
        seed: seed of the stored values; see `stored`.
        fsync: True if fsync() succeeded; None: not requested.
        fsync_errno: errno of a failed fsync().
    """

    cell: Cell
    page_size: int
    file: FileFacts | None
    mapping: MappingFacts
    seed: int
    fsync: bool | None
    fsync_errno: int | None

    @property
    def mapped_bytes(self) -> int:
        """The length of the mapping in whole pages, bytes (mm/mmap.c, do_mmap: PAGE_ALIGN)."""
        return -(-self.mapping.length // self.page_size) * self.page_size

    def stored(self) -> dict[int, bytes]:
        """The eight bytes stored in each page, by their offset in the file."""
        end = self.mapping.pages_accessed * self.page_size
        return {
            self.mapping.offset + at: _page_value(self.seed, at).to_bytes(8, "little")
            for at in range(0, end, self.page_size)
        }


def parse_cells(
    stdout: str, status: int, stderr: str, *, path: str, cells: Sequence[Cell]
) -> tuple[CellReport, ...]:
    """Parse the reports of several --cell; none may be missing, unknown or contradictory.

    Args:
        stdout: a line of JSON for each cell, in their order.
        status: exit status of map_sync.
        stderr: other output of map_sync.
        path: the requested file.
        cells: the requested mappings.

    Raises:
        ProbeError: the reports are invalid, or do not match the requests.
    """
    lines = stdout.splitlines()
    with malformed_as_probe_error("map_sync", stdout, status, stderr):
        check_report(len(lines) == len(cells), f"{len(lines)} answers to {len(cells)} cells")
        reports = [
            _report(read_line(_CellLine, line), cell, path)
            for line, cell in zip(lines, cells, strict=True)
        ]
        failed = any(report.mapping.result is MapResult.ERROR for report in reports)
        check_report(status == (4 if failed else 0), f"status {status}, a step failed: {failed}")
        check_report(len({report.page_size for report in reports}) < 2, "several page sizes")
    return tuple(reports)


class _CellLine(MapReport, frozen=True, kw_only=True):
    verb: Literal["cell"]
    seed: Natural
    fsync: bool | None
    fsync_errno: Natural | None
    fsync_errno_name: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_errno(self.fsync_errno, self.fsync_errno_name)
        check_report(self.seed <= _MASK, f"seed is {self.seed}")
        check_report((self.fsync is False) == (self.fsync_errno is not None), "fsync and errno")


def _report(line: _CellLine, cell: Cell, path: str) -> CellReport:
    """The report of `cell`; ProbeError if `line` does not match the request."""
    mapping = line.mapping
    answer = (
        *(line.path, line.opened, mapping.type, mapping.sync, mapping.unknown_bit, mapping.prot),
        *("MAP_ANONYMOUS" in mapping.flag_names, "MAP_FIXED" in mapping.flag_names),
        mapping.offset,
    )
    opened, prot, _ = cell.access.value
    requested = (
        *(path, "none" if cell.anonymous else opened, cell.type, cell.sync, cell.unknown_bit, prot),
        *(cell.anonymous, cell.address_align is not None, cell.offset),
    )
    check_report(answer == requested, f"it reports {answer}, requested was {requested}")
    if mapping.result is not MapResult.ERROR:
        length = mapping.length
        check_report(cell.length in (None, length), f"wrong length {length}")
        check_report((line.file is None) == cell.anonymous, "file of an anonymous mapping")
        check_report(
            (line.fsync is not None) == cell.fsync, "fsync was not requested, or is missing"
        )
    return CellReport(
        cell=cell,
        page_size=line.page_size,
        file=line.file,
        mapping=mapping,
        seed=line.seed,
        fsync=line.fsync,
        fsync_errno=line.fsync_errno,
    )


def _page_value(seed: int, at: int) -> int:
    """The value that map_sync stores `at` bytes into a mapping: guest_tools/map_sync.c."""
    return mix(seed + at * 0x9E3779B97F4A7C15)
