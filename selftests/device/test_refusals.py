# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of refusals are consistent, and a mismatch says all that is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from paprscm.device.launch import Attempt
from paprscm.device.refusal_rows import GROUPS, find_row
from paprscm.device.refusals import (
    FILES,
    LIMITS,
    Message,
    Refusal,
    backend,
    board,
    device,
    filled,
    make_files,
    without_option,
)

ROWS = [row for rows in GROUPS.values() for row in rows]
VERSIONS = [(7, 0, 0), (7, 2, 22), (8, 2, 0), (9, 2, 4), (10, 0, 13), (11, 1, 3), (12, 0, 0)]


def attempt(status: int, text: str) -> Attempt:
    return Attempt(status=status, text=text, answers=(), tree=None, duration_s=0.1)


@pytest.fixture
def row() -> Refusal:
    texts = (Message("{memdev} is bad", until=(8, 1)), Message("{memdev} is worse", since=(8, 1)))
    return Refusal("bad", board(*backend(), *device()), texts, "here.c:there")


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    return make_files(tmp_path)


def test_each_name_is_there_once() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names)) > 50
    assert all(find_row(row.name) is row for row in ROWS)


@pytest.mark.parametrize("version", VERSIONS)
def test_one_message_holds_for_each_version(version: tuple[int, int, int]) -> None:
    wrong = [row.name for row in ROWS if sum(m.holds(version) for m in row.messages) != 1]
    assert not wrong


def test_a_range_includes_its_first_version_and_not_its_last(row: Refusal) -> None:
    texts = [row.message(version).text for version in ((8, 0, 9), (8, 1, 0), (8, 2, 0))]
    assert texts == ["{memdev} is bad", "{memdev} is worse", "{memdev} is worse"]
    assert [str(message) for message in row.messages] == [
        "QEMU 7.0 to before 8.1",
        "QEMU 8.1 and later",
    ]


def test_all_placeholders_are_made(places: dict[str, str]) -> None:
    for row in ROWS:
        filled(row.words, places)
        for version in VERSIONS:
            row.expected(version, places)
    for words in LIMITS.values():
        filled(words, places)
    assert {Path(places[name]).stat().st_size for name in FILES} == set(FILES.values())
    assert Path(places["fifo"]).is_fifo()
    assert not Path(places["absent"]).exists()


def test_the_option_in_front_is_taken_off(row: Refusal, places: dict[str, str]) -> None:
    words = filled(row.words, places)
    assert without_option(f"{words[-2]} {words[-1]}: no\nand no", words) == "no\nand no"
    assert without_option("-device other: no", words) == "-device other: no"


def test_what_is_as_expected_has_no_difference(row: Refusal, places: dict[str, str]) -> None:
    words = filled(row.words, places)
    assert row.difference(attempt(1, "mem0 is bad"), (7, 2, 22), places) is None
    said = f"-device {words[-1]}: mem0 is bad"
    assert row.difference(attempt(1, said), (7, 2, 22), places) is None


@pytest.mark.parametrize(
    ("status", "text"), [(1, "mem0 is worse"), (0, "mem0 is bad"), (-11, "mem0 is bad"), (1, "")]
)
def test_a_difference_shows_both_texts(
    row: Refusal, places: dict[str, str], status: int, text: str
) -> None:
    found = row.difference(attempt(status, text), (7, 2, 22), places)
    assert found is not None
    assert found.startswith("bad: ")
    assert text in found
    assert "expected (QEMU 7.0 to before 8.1; here.c:there):\n    mem0 is bad" in found
