# SPDX-License-Identifier: GPL-2.0-or-later
"""Comparisons of paprscm.checks, and the report of differences."""

from __future__ import annotations

import pytest

from paprscm.checks import (
    Difference,
    Matcher,
    above,
    at_least,
    at_most,
    below,
    containing,
    describe,
    differ,
    matching,
    one_of,
    other_than,
)


@pytest.mark.parametrize(
    ("matcher", "equal", "different", "words"),
    [
        (at_least(2), 2, 1.9, "at least 2"),
        (at_most(2), 2, 2.1, "at most 2"),
        (above(2), 3, 2, "more than 2"),
        (below(2), 1, 2, "less than 2"),
        (other_than([]), [1], [], "other than []"),
        (containing("EIO"), "got EIO", "got ENOSPC", "containing 'EIO'"),
        (one_of(1, 4), 4, 2, "one of 1, 4"),
        (matching("E(IO|ROFS)$"), "got EROFS", "EROFS?", "matching 'E(IO|ROFS)$'"),
    ],
    ids=repr,
)
def test_a_matcher_equals_the_values_of_its_name(
    matcher: Matcher, equal: object, different: object, words: str
) -> None:
    assert not differ(equal, matcher)
    assert differ(different, matcher)
    assert repr(matcher) == words


def test_a_matcher_decides_inside_other_values() -> None:
    assert not differ((3, {"a": [5]}), (at_least(2), {"a": [below(6)]}))
    assert differ((3, {"a": [6]}), (at_least(2), {"a": [below(6)]}))


def test_one_difference_is_a_sentence() -> None:
    assert describe([Difference("syncs", 1, at_least(2))]) == "syncs: 1, expected at least 2"


def test_several_differences_are_a_table() -> None:
    rows = [Difference("syncs", 1, at_least(2)), Difference("errno of fsync", 0, 5)]
    assert describe(rows) == (
        "2 differences:\n"
        "                  found  expected\n"
        "  syncs           1      at least 2\n"
        "  errno of fsync  0      5"
    )


def test_details_come_after_the_values() -> None:
    one = Difference("file", "accepted", "refused", "sf in VmFlags")
    assert str(one) == "file: 'accepted', expected 'refused' (sf in VmFlags)"
    lines = describe([Difference("syncs", 1, 2), one]).splitlines()
    assert lines[-2:] == ["  file   'accepted'  'refused'", "  file: sf in VmFlags"]


@pytest.mark.parametrize("value", ["two\nlines", "x" * 80])
def test_long_values_are_a_list(value: str) -> None:
    lines = describe([Difference("a", 1, 2), Difference("b", value, "")]).splitlines()
    assert lines[:4] == ["2 differences:", "  a:", "    1", "    expected 2"]
    assert len(max(lines, key=len)) < 90
