# SPDX-License-Identifier: GPL-2.0-or-later
"""Run guest_tools/map_sync.c in a guest and return its reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from paprscm.guest.guest import Guest
from paprscm.guest.report import ProbeError
from paprscm.guest.tools import run_tool
from paprscm.map_sync.mmap_report import Cell, CellReport, parse_cells
from paprscm.map_sync.verdict import (
    MapSyncReport,
    parse_map_sync,
)

MapType = Literal["shared", "shared_validate", "private", "none"]


Prot = Literal["rw", "r", "w", "none"]


def map_sync(
    guest: Guest,
    path: str,
    *,
    pages: int = 1,
    truncate: bool = True,
    read_only: bool = False,
    offset: int = 0,
    length: int | None = None,
    map_type: MapType = "shared_validate",
    sync: bool = True,
    unknown_bit: bool = False,
    prot: Prot = "rw",
    control: bool = True,
) -> MapSyncReport:
    """Try a mapping in the guest and report all that is needed to judge it, in one round trip.

    Args:
        guest: where.
        path: the file there.
        pages: make the file anew with so many pages (holes), what was in it is lost.
        truncate: False: take the file as it is instead; it must exist.
        read_only: have it open O_RDONLY for the mapping.
        offset, length: the range to map, bytes; None: to the end of the file.
        map_type, sync, unknown_bit, prot: the mapping; the defaults ask the suite's main question.
        control: first try MAP_SHARED_VALIDATE alone on the same range.

    Raises:
        ProbeError: the probe does not build, or gave no report that can be believed.
    """
    options = [f"--type={map_type}", f"--sync={'on' if sync else 'off'}", f"--prot={prot}"]
    options += [f"--offset={offset}"] + ([] if length is None else [f"--length={length}"])
    options += [f"--pages={pages}"] if truncate else ["--no-truncate"]
    options += ["--read-only"] * read_only + ["--unknown-bit"] * unknown_bit
    options += ["--control"] * control
    result = run_tool(guest, "map_sync", [*options, "--", path])
    report = parse_map_sync(result.stdout, result.status, result.stderr)
    mapping = report.mapping
    asked = (path, map_type, sync, unknown_bit, prot, offset, "r" if read_only else "rw")
    told = (
        *(report.path, mapping.type, mapping.sync, mapping.unknown_bit, mapping.prot),
        *(mapping.offset, report.opened),
    )
    reached = report.file is not None
    if (
        asked != told
        or (reached and length not in (None, mapping.length))
        or (reached and control != (report.control is not None))
    ):
        raise ProbeError(f"map_sync answers {told}, it was asked for {asked}: {report.line}")
    return report


def map_sync_cells(
    guest: Guest, path: str, cells: Sequence[Cell], *, pages: int | None = 1
) -> tuple[CellReport, ...]:
    """Try several mappings of a file in the guest, one after the other, in one round trip.

    Args:
        guest: where.
        path: the file there.
        cells: what to try.
        pages: make the file anew for each cell, with so many pages (holes); None: take it as it
            is, it must exist.

    Raises:
        ProbeError: the probe does not build, or gave no report that can be believed.
    """
    words = ["--no-truncate" if pages is None else f"--pages={pages}"]
    words += [f"--cell={cell.words}" for cell in cells]
    result = run_tool(guest, "map_sync", [*words, "--", path])
    return parse_cells(result.stdout, result.status, result.stderr, path=path, cells=cells)
