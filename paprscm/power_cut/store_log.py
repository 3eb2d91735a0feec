# SPDX-License-Identifier: GPL-2.0-or-later
"""Contents of backing files at the begin of each sync, logged by the flush shim."""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Final

from paprscm.errors import HostError
from paprscm.host.sparse import data_ranges

PAGE: Final = 4096
"""Unit of the log, bytes: the smallest page of a host."""
ZEROS: Final = bytes(PAGE)
_ENTRY: Final = struct.Struct("<IIQII")
_END: Final = (1 << 63) - 1
_PAGE: Final = struct.Struct(f"<II{PAGE}s")


class Kind(IntEnum):
    """Kind of an entry; the values are those of store_log.h."""

    BEGIN = 1
    END = 2


@dataclass(frozen=True)
class Sync:
    """A sync in the log.

    Attributes:
        number: its number, as of the records of its QEMU's shim.
        file: number of its file, in the order in which the files were watched.
        point: number of the point at which it began.
        ended: number of the first point after its end; None: it did not end.
        error: its errno, 0 for success.
        start, end: the bytes of the file that it covers.
    """

    number: int
    file: int
    point: int
    ended: int | None = None
    error: int = 0
    start: int = 0
    end: int = _END

    def covers(self, page: int) -> bool:
        """The sync writes the whole page."""
        return self.start <= page * PAGE and (page + 1) * PAGE <= self.end


@dataclass(frozen=True)
class StoreLog:
    """The content of the files at each point: the begin of a sync, or the end of the log.

    Attributes:
        pages: for each point, the contents that have changed since the point before, by file and
            number of the page.
        syncs: the syncs, in the order in which they began.
    """

    pages: Sequence[Mapping[tuple[int, int], bytes]]
    syncs: Sequence[Sync]

    @property
    def last(self) -> int:
        """Number of the last point."""
        return len(self.pages) - 1

    @functools.cached_property
    def histories(self) -> dict[tuple[int, int], list[tuple[int, bytes]]]:
        """For each page by file and number: the points at which it changed, and its content."""
        histories: dict[tuple[int, int], list[tuple[int, bytes]]] = {}
        for point, changed in enumerate(self.pages):
            for where, content in changed.items():
                histories.setdefault(where, []).append((point, content))
        return histories


@dataclass(frozen=True)
class LogPart:
    """The log of one QEMU.

    Attributes:
        path: its file.
        ranges: by the number of a sync, start and end of the bytes that it covers; one that is not
            there covers the whole file.
    """

    path: Path
    ranges: Mapping[int, tuple[int, int]] = field(default_factory=dict)


def read_log(parts: Sequence[LogPart], files: Sequence[Path]) -> StoreLog:
    """Read the logs of QEMUs of which each continued the guest of the one before.

    Args:
        parts: their logs. The last QEMU is stopped or has ended, the others have ended.
        files: the watched files, which all of them had, in the order in which they were watched.

    Returns:
        The whole log; its last point is now.

    Raises:
        HostError: a log is not complete.
    """
    pages: list[dict[tuple[int, int], bytes]] = []
    syncs: list[Sync] = []
    now: dict[tuple[int, int], bytes] = {}
    for part in parts:
        begun: dict[int, Sync] = {}
        # The first entry has everything that is not zero.
        zeroed = {place: ZEROS for place, content in now.items() if content != ZEROS}
        for kind, number, file, result, content in _entries(part.path):
            if kind == Kind.BEGIN:
                start, end = part.ranges.get(number, (0, _END))
                begun[number] = Sync(number, file, len(pages), start=start, end=end)
                whole, zeroed = zeroed | content, {}
                changed = {place: c for place, c in whole.items() if c != now.get(place, ZEROS)}
                pages.append(changed)
                now |= changed
            else:
                begun[number] = replace(begun[number], ended=len(pages), error=result)
        syncs += begun.values()
    pages.append(dict(_changes(files, now)))
    return StoreLog(pages, tuple(syncs))


def _entries(path: Path) -> Iterator[tuple[Kind, int, int, int, dict[tuple[int, int], bytes]]]:
    """Yield kind, number of the sync, file, result and changed pages of each entry."""
    data = memoryview(path.read_bytes())

    def unpack(at: int) -> tuple[int, int, bytes]:
        file, page, content = _PAGE.unpack_from(data, at)
        return file, page, content

    at = 0
    while at < len(data):
        try:
            kind, count, number, file, result = _ENTRY.unpack_from(data, at)
            at += _ENTRY.size
            heads = range(at, at + count * _PAGE.size, _PAGE.size)
            changed = {(one, page): content for one, page, content in map(unpack, heads)}
        except struct.error as error:
            raise HostError(f"the log of stores {path} ends within an entry") from error
        at += count * _PAGE.size
        if kind not in list(Kind):
            raise HostError(f"the log of stores {path} has an entry of the unknown kind {kind}")
        yield Kind(kind), number, file, result, changed


def _changes(
    files: Sequence[Path], known: Mapping[tuple[int, int], bytes]
) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Pages of the files that differ from the log."""
    for number, path in enumerate(files):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = set(data_pages(handle))
            there |= {page for file, page in known if file == number}
            for page in sorted(there):
                content = os.pread(handle, PAGE, page * PAGE)
                if content != known.get((number, page), ZEROS):
                    yield (number, page), content
        finally:
            os.close(handle)


def data_pages(handle: int) -> Iterator[int]:
    """Numbers of the pages of a sparse file that are not in a hole."""
    for start, end in data_ranges(handle):
        yield from range(start // PAGE, -(-end // PAGE))
