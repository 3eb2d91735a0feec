# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of DIMMs that a power cut may leave on the host.

They follow from the log of stores and from what a host guarantees:

- A page has at least the content that it had when the last successful sync of it began that had
  ended before the cut.
- It may have any later content: the host writes back pages when it likes, in any order.
- The host writes a page of 4 KiB as a whole; in the pessimistic mode each sector of 512 bytes is
  written on its own.
- After a failed sync the host may have dropped the pages that were to be written: it marks them
  clean and reports the error once, so that a later sync succeeds without them (fsync(2), "since
  Linux 4.13").
"""

from __future__ import annotations

import bisect
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paprscm.power_cut.steps import SECTOR
from paprscm.power_cut.store_log import PAGE, ZEROS, StoreLog, Sync, data_pages

Place = tuple[int, int]
"""Number of a file, and number of a page in it."""


class Cut:
    """The power goes off at one point of the log.

    Args:
        log: the log of stores.
        point: the cut is at this point: stores until then may be in the image.
        counts: syncs that count. A sync that is left out is a lie: it returned, and guarantees
            nothing.
    """

    def __init__(
        self, log: StoreLog, point: int, *, counts: Callable[[Sync], bool] = lambda _sync: True
    ) -> None:
        self._kept: dict[int, list[Sync]] = {}
        self._failed: dict[int, list[Sync]] = {}
        for sync in sorted(log.syncs, key=lambda sync: sync.point, reverse=True):
            if sync.ended is not None and sync.ended <= point and counts(sync):
                (self._failed if sync.error else self._kept).setdefault(sync.file, []).append(sync)
        self.versions: dict[Place, list[bytes]] = {}
        """Contents that a page may have, the guaranteed one first; each once."""
        self.newest: dict[Place, bytes] = {}
        """The contents at the point of the cut."""
        for place, history in log.histories.items():
            until = [(at, content) for at, content in history if at <= point]
            self.versions[place] = self._legal(place, until)
            self.newest[place] = until[-1][1] if until else ZEROS

    @property
    def oldest(self) -> dict[Place, bytes]:
        """The contents that are guaranteed."""
        return {place: contents[0] for place, contents in self.versions.items()}

    @property
    def free(self) -> list[Place]:
        """Pages with more than one legal content."""
        return [place for place, contents in self.versions.items() if len(contents) > 1]

    @property
    def count(self) -> int:
        """Number of different combinations of pages."""
        return math.prod(len(contents) for contents in self.versions.values())

    def _legal(self, place: Place, history: Sequence[tuple[int, bytes]]) -> list[bytes]:
        """Contents of a page from the newest guaranteed one on; without repetitions."""
        changes = [-1, *(point for point, _ in history)]
        contents = [ZEROS, *(content for _, content in history)]
        oldest = 0
        # From the newest one on: usually the first one counts.
        file, page = place
        for sync in self._kept.get(file, ()):
            if sync.covers(page) and self._wrote(sync, place, changes):
                oldest = bisect.bisect_right(changes, sync.point) - 1
                break
        return list(dict.fromkeys(contents[oldest:]))

    def _wrote(self, sync: Sync, place: Place, changes: Sequence[int]) -> bool:
        """The sync has written the page, or an earlier one had: no failed sync has dropped it."""
        file, page = place
        changed = changes[bisect.bisect_right(changes, sync.point) - 1]
        return all(
            bad.point < changed
            or _ended(bad) > sync.point
            or any(
                changed <= one.point and _ended(one) <= bad.point
                for one in self._kept[file]
                if one.covers(page)
            )
            for bad in self._failed.get(file, ())
            if bad.covers(page)
        )


def _ended(sync: Sync) -> int:
    assert sync.ended is not None  # noqa: S101 - Cut keeps only these
    return sync.ended


@dataclass(frozen=True)
class Image:
    """Contents of all DIMMs.

    Attributes:
        name: how the pages were chosen.
        pages: contents by place; all other pages are zeros.
    """

    name: str
    pages: Mapping[Place, bytes]

    @property
    def digest(self) -> int:
        """Hash of the contents; equal images are judged once."""
        # Python keeps the hash of each page's content.
        return hash(frozenset(item for item in self.pages.items() if item[1] != ZEROS))


def images(cut: Cut, dice: random.Random, *, limit: int, torn: bool = False) -> Iterator[Image]:
    """Different legal images: all of them if there are at most `limit`, else a choice.

    The choice begins with the oldest image. The others are random: the newest one, those with one
    page newer or older than all others, and mixtures with few, half or most pages chosen freely.

    Args:
        cut: the cut.
        dice: source of the random choices.
        limit: largest number of images.
        torn: each sector of 512 bytes is written on its own.
    """
    seen: set[int] = set()
    makers = _all(cut) if cut.count <= limit and not torn else _some(cut, dice, torn=torn)
    # A random choice may repeat earlier ones: give up when it finds few new images.
    for image in itertools.islice(makers, 4 * limit):
        if image.digest not in seen:
            seen.add(image.digest)
            yield image
        if len(seen) == limit:
            return


def _all(cut: Cut) -> Iterator[Image]:
    places = list(cut.versions)
    for number, contents in enumerate(itertools.product(*cut.versions.values())):
        yield Image(f"combination {number}", dict(zip(places, contents, strict=True)))


def _some(cut: Cut, dice: random.Random, *, torn: bool) -> Iterator[Image]:
    """The oldest image, which shows most losses, and then random ones without end."""
    oldest, newest, free = cut.oldest, cut.newest, cut.free
    yield Image("oldest", oldest)
    for number in itertools.count() if free else ():
        place, kind = dice.choice(free), dice.random()
        if kind < 0.1:
            yield Image("newest", newest)
        elif kind < 0.3:
            yield Image(f"only {place} newer", {**oldest, place: newest[place]})
        elif kind < 0.5:
            yield Image(f"only {place} older", {**newest, place: oldest[place]})
        else:
            share = dice.choice((0.1, 0.5, 0.9))
            chosen = [place for place in free if dice.random() < share]
            contents = {place: cut.versions[place] for place in chosen}
            pages = {
                place: _tear(legal, dice) if torn else dice.choice(legal)
                for place, legal in contents.items()
            }
            yield Image(f"random {number}", {**oldest, **pages})


def _tear(contents: Sequence[bytes], dice: random.Random) -> bytes:
    """A page of which each sector is written on its own."""
    sectors = range(0, PAGE, SECTOR)
    return b"".join(dice.choice(contents)[start : start + SECTOR] for start in sectors)


def write_image(image: Image, file: int, path: Path) -> int:
    """Give a file the content of an image; return the number of pages that were written.

    Args:
        image: the image.
        file: number of the file in the log.
        path: a file of the same size. A guest may have it as a DIMM, without using it now.
    """
    pages = {page: content for (number, page), content in image.pages.items() if number == file}
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    written = 0
    try:
        for page in sorted(pages.keys() | set(data_pages(handle))):
            content = pages.get(page, ZEROS)
            if os.pread(handle, PAGE, page * PAGE) != content:
                os.pwrite(handle, content, page * PAGE)
                written += 1
    finally:
        os.close(handle)
    return written
