# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools in the guest: compiled there, run there, their reports parsed strictly and judged."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from paprscm.map_sync_cells import Cell, CellReport, parse_cells
from paprscm.map_sync_report import (
    FileFacts,
    Judgement,
    Mapping,
    MapSyncReport,
    ProbeError,
    Result,
    Verdict,
    expect,
    judge,
    parse_map_sync,
)
from paprscm.ssh import TimedOutError

if TYPE_CHECKING:
    from paprscm.guest import Guest
    from paprscm.ssh import CommandResult

__all__ = [
    "TOOLS",
    "FileFacts",
    "Judgement",
    "MapSyncReport",
    "Mapping",
    "ProbeError",
    "Result",
    "Verdict",
    "build",
    "digest",
    "expect",
    "judge",
    "map_sync",
    "map_sync_cells",
    "parse_map_sync",
]

_SOURCES = Path(__file__).resolve().parent.parent / "guest_tools"
_TARGET = PurePosixPath("/tmp/paprscm-tools")  # noqa: S108 - a folder of the guest's
_GCC = "gcc -O2 -Wall -Wextra -Werror"
_GCC_LIMIT_S = 120.0
# None of the probe's own exit statuses (guest_tools/map_sync.c).
_NOT_BUILT = 70

TOOLS = ("map_sync", "promise", "faults", "flush", "persist", "same_block")
"""What is compiled once, before a guest is saved, so that restored guests have it."""

MapType = Literal["shared", "shared_validate", "private", "none"]
Prot = Literal["rw", "r", "w", "none"]


def build(guest: Guest, name: str) -> PurePosixPath:
    """Compile guest_tools/NAME.c in the guest, unless this very source already is; its path there.

    Raises:
        ProbeError: there is no such tool, or gcc does not take it, or not in time.
    """
    content, target = _tool(name)
    base = shlex.quote(str(target))
    try:
        result = guest.run(
            f"[ -x {base} ] && {{ cat > /dev/null; exit; }}\n"
            f"mkdir -p {_TARGET} && cat > {base}.$$.c && {_GCC} -o {base}.$$ {base}.$$.c "
            f"&& mv {base}.$$ {base} && rm {base}.$$.c",
            stdin=content,
            timeout_s=_GCC_LIMIT_S,
        )
    except TimedOutError as error:
        # gcc touches no DIMM: on a host that is too busy it takes so long.
        raise ProbeError(
            f"gcc in the guest did not compile guest_tools/{name}.c within {_GCC_LIMIT_S:g} s",
            hint="run fewer tests at the same time, or on an idle host",
        ) from error
    if result.status:
        raise ProbeError(
            f"guest_tools/{name}.c does not compile in the guest (status {result.status}):\n"
            f"{result.stderr.strip()}"
        )
    return target


def digest(*names: str) -> str:
    """What the tools of these names are at this moment, and how they are compiled."""
    targets = " ".join(str(_tool(name)[1]) for name in names)
    return hashlib.sha256(f"{_GCC} {targets}".encode()).hexdigest()


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
    result = _run(guest, "map_sync", [*options, "--", path])
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
    result = _run(guest, "map_sync", [*words, "--", path])
    return parse_cells(result.stdout, result.status, result.stderr, path=path, cells=cells)


def _run(guest: Guest, name: str, words: Sequence[str]) -> CommandResult:
    """Run a tool in the guest, compiled there before if it is not yet."""
    binary = str(_tool(name)[1])
    command = f"[ -x {binary} ] || exit {_NOT_BUILT}\n{shlex.join([binary, *words])}"
    result = guest.run(command)
    if result.status == _NOT_BUILT:
        build(guest, name)
        result = guest.run(command)
    return result


def _tool(name: str) -> tuple[bytes, PurePosixPath]:
    """A tool's source, and where its binary is in the guest: named after that very source."""
    try:
        content = (_SOURCES / f"{name}.c").read_bytes()
    except OSError as error:
        raise ProbeError(f"guest_tools/{name}.c: {error.strerror}") from error
    return content, _TARGET / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
