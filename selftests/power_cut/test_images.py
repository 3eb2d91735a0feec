# SPDX-License-Identifier: GPL-2.0-or-later
"""Log of stores, and the images that it allows."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from paprscm.errors import HostError
from paprscm.power_cut.images import Cut, images, write_image
from paprscm.power_cut.store_log import PAGE, ZEROS, LogPart, StoreLog, Sync, read_log


def dice() -> random.Random:
    return random.Random(1)  # noqa: S311


def page(letter: str) -> bytes:
    return letter.encode() * PAGE


def log_of(changes: Sequence[str], *syncs: Sync) -> StoreLog:
    """A log of one file: for each point, the letters of the pages that changed ("-": not)."""
    points = [
        {(0, number): page(letter) for number, letter in enumerate(text) if letter != "-"}
        for text in changes
    ]
    return StoreLog(points, syncs)


def legal(cut: Cut) -> dict[int, str]:
    """For each page the letters that it may have; "0" for zeros."""
    return {
        number: "".join("0" if content == ZEROS else chr(content[0]) for content in contents)
        for (_, number), contents in cut.versions.items()
    }


def test_a_completed_sync_is_the_lower_bound() -> None:
    log = log_of(["aa", "b-", "cc"], Sync(0, 0, 0, ended=1), Sync(1, 0, 1, ended=2))
    assert legal(Cut(log, 0)) == {0: "0a", 1: "0a"}
    # At point 1 the first sync has ended, and the second one begins.
    assert legal(Cut(log, 1)) == {0: "ab", 1: "a"}
    assert legal(Cut(log, 2)) == {0: "bc", 1: "ac"}


def test_a_sync_guarantees_what_was_stored_before_it_began() -> None:
    # It ends after point 2; what was stored while it ran may be lost.
    log = log_of(["a", "b", "c"], Sync(0, 0, 0, ended=2))
    assert legal(Cut(log, 1)) == {0: "0ab"}
    assert legal(Cut(log, 2)) == {0: "abc"}


def test_a_sync_of_a_range_guarantees_its_pages() -> None:
    log = log_of(["aaa", "bbb", "ccc"], Sync(0, 0, 0, ended=1, start=PAGE, end=2 * PAGE + 1))
    assert legal(Cut(log, 1)) == {0: "0ab", 1: "ab", 2: "0ab"}
    # A failed sync of other pages drops nothing.
    failed = Sync(0, 0, 0, ended=1, error=5, end=PAGE)
    log = log_of(["aa", "--", "--"], failed, Sync(1, 0, 1, ended=2))
    assert legal(Cut(log, 2)) == {0: "0a", 1: "a"}


def test_a_sync_that_did_not_end_or_failed_or_lies_guarantees_nothing() -> None:
    for sync in (Sync(0, 0, 0), Sync(0, 0, 0, ended=1, error=5), Sync(0, 1, 0, ended=1)):
        assert legal(Cut(log_of(["a", "b"], sync), 1)) == {0: "0ab"}
    log = log_of(["a", "b"], Sync(0, 0, 0, ended=1))
    assert legal(Cut(log, 1)) == {0: "ab"}
    assert legal(Cut(log, 1, counts=lambda sync: sync.number != 0)) == {0: "0ab"}


def test_after_a_failed_sync_a_later_one_succeeds_without_its_pages() -> None:
    """The host has marked the pages clean; only those that were stored to again are written."""
    failed, later = Sync(0, 0, 0, ended=1, error=5), Sync(1, 0, 1, ended=2)
    log = log_of(["aa", "b-", "--"], failed, later)
    assert legal(Cut(log, 2)) == {0: "b", 1: "0a"}
    # Pages that an earlier sync had written are safe.
    early = Sync(9, 0, 0, ended=1)
    log = log_of(["aa", "--", "b-", "--"], early, Sync(0, 0, 1, ended=2, error=5), later)
    assert legal(Cut(log, 3)) == {0: "ab", 1: "a"}


def test_equal_contents_are_one() -> None:
    log = log_of(["a", "b", "a"], Sync(0, 0, 0, ended=1))
    assert legal(Cut(log, 2)) == {0: "ab"}
    # The newest content, although it is also the oldest one.
    assert Cut(log, 2).newest == {(0, 0): page("a")}
    assert Cut(log, 1).newest == {(0, 0): page("b")}


def test_all_images_if_they_are_few() -> None:
    cut = Cut(log_of(["aa", "bb", "c-"], Sync(0, 0, 0, ended=1)), 2)
    assert cut.count == 6
    found = {
        bytes([content[0] for _, content in sorted(image.pages.items())])
        for image in images(cut, dice(), limit=6)
    }
    assert found == {b"aa", b"ab", b"ba", b"bb", b"ca", b"cb"}


@pytest.mark.parametrize("torn", [False, True])
def test_a_choice_of_many_images(torn: bool) -> None:
    cut = Cut(log_of(["a" * 20, "b" * 20], Sync(0, 0, 0, ended=1)), 1)
    assert cut.count == 1 << 20
    chosen = list(images(cut, dice(), limit=100, torn=torn))
    assert len({image.digest for image in chosen}) == len(chosen) == 100
    assert chosen[0].name == "oldest"
    assert {image.name.partition(" ")[0] for image in chosen} == {
        *("oldest", "newest", "only", "random"),
    }
    mixed = [
        content for image in chosen for content in image.pages.values() if len(set(content)) > 1
    ]
    assert bool(mixed) == torn
    for content in mixed:
        for at in range(0, PAGE, 512):
            assert content[at : at + 512] in (b"a" * 512, b"b" * 512)
    again = images(cut, dice(), limit=100, torn=torn)
    assert [image.digest for image in again] == [image.digest for image in chosen]


def test_a_cut_without_choice_has_one_image() -> None:
    cut = Cut(log_of(["ab", "--"], Sync(0, 0, 0, ended=1)), 1)
    assert [image.name for image in images(cut, dice(), limit=50)] == ["combination 0"]


def test_an_image_is_written_into_a_sparse_file(tmp_path: Path) -> None:
    file = tmp_path / "dimm"
    with file.open("wb") as handle:
        handle.truncate(100 * PAGE)
        handle.seek(50 * PAGE)
        handle.write(page("x"))
    cut = Cut(log_of(["a--b"]), 0)
    image = next(one for one in images(cut, dice(), limit=4) if ZEROS not in one.pages.values())
    assert write_image(image, 0, file) == 3
    content = file.read_bytes()
    assert content[50 * PAGE : 51 * PAGE] == ZEROS
    for (_, number), expected in image.pages.items():
        assert content[number * PAGE : (number + 1) * PAGE] == expected
    assert write_image(image, 0, file) == 0
    assert file.stat().st_blocks * 512 < 10 * PAGE


def test_a_log_is_read(tmp_path: Path) -> None:
    file, log = tmp_path / "dimm", tmp_path / "log"
    file.write_bytes(page("c") + page("b") + ZEROS)
    begin = struct.Struct("<IIQII")
    log.write_bytes(
        begin.pack(1, 2, 7, 0, 0)
        + struct.pack("<II", 0, 0) + page("a")
        + struct.pack("<II", 0, 1) + page("b")
        + begin.pack(1, 0, 8, 0, 0)
        + begin.pack(2, 0, 7, 0, 5)
    )  # fmt: skip
    found = read_log([LogPart(log)], [file])
    assert found.syncs == (Sync(7, 0, 0, ended=2, error=5), Sync(8, 0, 1))
    assert found.pages == [
        {(0, 0): page("a"), (0, 1): page("b")},
        {},
        {(0, 0): page("c")},
    ]


@pytest.mark.parametrize("cut_bytes", [1, 5000])
def test_a_log_that_is_not_complete(tmp_path: Path, cut_bytes: int) -> None:
    log = tmp_path / "log"
    whole = struct.pack("<IIQII", 1, 2, 7, 0, 0) + (struct.pack("<II", 0, 0) + page("a")) * 2
    log.write_bytes(whole[:-cut_bytes])
    with pytest.raises(HostError, match="ends within an entry"):
        read_log([LogPart(log)], [])
    log.write_bytes(b"\3" + whole[1:])
    with pytest.raises(HostError, match="unknown kind 3"):
        read_log([LogPart(log)], [])
