# SPDX-License-Identifier: GPL-2.0-or-later
"""Run guest_tools/map_sync.c in a guest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from paprscm.guest.guest import Guest
from paprscm.guest.report import ProbeError
from paprscm.guest.tools import run_tool
from paprscm.map_sync.mmap_report import Cell, CellReport, parse_cells
from paprscm.map_sync.verdict import MapSyncReport, parse_map_sync

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
    """Try a mapping in the guest and report all facts to judge it, in one round trip.

    Args:
        guest: the guest.
        path: the file in the guest.
        pages: size of the new file, pages (holes); its old content is lost.
        truncate: False: use the existing file unchanged.
        read_only: open the file O_RDONLY for the mapping.
        offset, length: the range to map, bytes; None: to the end of the file.
        map_type, sync, unknown_bit, prot: the mapping; the defaults ask for MAP_SYNC.
        control: first try MAP_SHARED_VALIDATE alone on the same range.

    Raises:
        ProbeError: the probe does not compile, or its report is invalid.
    """
    options = [f"--type={map_type}", f"--sync={'on' if sync else 'off'}", f"--prot={prot}"]
    options += [f"--offset={offset}"] + ([] if length is None else [f"--length={length}"])
    options += [f"--pages={pages}"] if truncate else ["--no-truncate"]
    options += ["--read-only"] * read_only + ["--unknown-bit"] * unknown_bit
    options += ["--control"] * control
    result = run_tool(guest, "map_sync", [*options, "--", path])
    report = parse_map_sync(result.stdout, result.status, result.stderr)
    mapping = report.mapping
    requested = (path, map_type, sync, unknown_bit, prot, offset, "r" if read_only else "rw")
    reported = (
        *(report.path, mapping.type, mapping.sync, mapping.unknown_bit, mapping.prot),
        *(mapping.offset, report.opened),
    )
    reached = report.file is not None
    if (
        requested != reported
        or (reached and length not in (None, mapping.length))
        or (reached and control != (report.control is not None))
    ):
        raise ProbeError(f"map_sync reports {reported}, requested was {requested}: {report.line}")
    return report


def map_sync_cells(
    guest: Guest, path: str, cells: Sequence[Cell], *, pages: int | None = 1
) -> tuple[CellReport, ...]:
    """Try several mappings of a file in the guest, one after the other, in one round trip.

    Args:
        guest: the guest.
        path: the file in the guest.
        cells: the mappings.
        pages: size of a new file for each cell, pages (holes); None: use the existing file
            unchanged.

    Raises:
        ProbeError: the probe does not compile, or its report is invalid.
    """
    words = ["--no-truncate" if pages is None else f"--pages={pages}"]
    words += [f"--cell={cell.words}" for cell in cells]
    result = run_tool(guest, "map_sync", [*words, "--", path])
    return parse_cells(result.stdout, result.status, result.stderr, path=path, cells=cells)
