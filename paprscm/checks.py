# SPDX-License-Identifier: GPL-2.0-or-later
"""Differences from the contract, and matchers for expected values that are not a single value.

self.check("syncs of two fsyncs", count, at_least(2))
self.check("begun, failed", (counts.begun, counts.failed), (at_least(1), 0))
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_WIDE = 60
"""Maximum width of a value in a table, columns."""


@dataclass(frozen=True)
class Difference:
    """One value that differs from the contract.

    Attributes:
        what: the name of the value.
        found: the value.
        expected: the contract's value, or a Matcher.
        detail: the observation behind the value, or "".
    """

    what: str
    found: object
    expected: object
    detail: str = ""

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.what}: {_format(self.found)}, expected {_format(self.expected)}{detail}"


def differ(found: object, expected: object) -> bool:
    """Compare; the expected value is the left operand, so that a Matcher in it decides."""
    return bool(expected != found)


def describe(differences: Sequence[Difference]) -> str:
    """One difference as a sentence; several as a table, or as a list if the values are long."""
    if len(differences) == 1:
        return str(differences[0])
    rows = [("", "found", "expected")]
    rows += [(d.what, _format(d.found), _format(d.expected)) for d in differences]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    if second <= _WIDE and not any("\n" in cell for row in rows for cell in row):
        lines = [
            f"{what:<{first}}  {found:<{second}}  {expected}" for what, found, expected in rows
        ]
    else:
        lines = [f"{what}:\n  {found}\n  expected {expected}" for what, found, expected in rows[1:]]
    lines += [f"{d.what}: {d.detail}" for d in differences if d.detail]
    return f"{len(differences)} differences:\n" + textwrap.indent("\n".join(lines), "  ")


def _format(value: object) -> str:
    """The value as printed in a report; multi-line text stays unquoted."""
    return value if isinstance(value, str) and "\n" in value else repr(value)


class Matcher:
    """An expected value that equals several values, alone or inside a tuple, list or dict.

    Args:
        words: the name in reports, such as "at least 2".
        accepts: returns True for a value that matches.
    """

    def __init__(self, words: str, accepts: Callable[[Any], bool]) -> None:
        self._words, self._accepts = words, accepts

    def __eq__(self, other: object) -> bool:
        return self._accepts(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return self._words


def at_least(limit: float) -> Matcher:
    """Equals every number >= limit."""
    return Matcher(f"at least {limit}", lambda value: value >= limit)


def at_most(limit: float) -> Matcher:
    """Equals every number <= limit."""
    return Matcher(f"at most {limit}", lambda value: value <= limit)


def above(limit: float) -> Matcher:
    """Equals every number > limit."""
    return Matcher(f"more than {limit}", lambda value: value > limit)


def below(limit: float) -> Matcher:
    """Equals every number < limit."""
    return Matcher(f"less than {limit}", lambda value: value < limit)


def other_than(value: object) -> Matcher:
    """Equals everything except this value."""
    return Matcher(f"other than {value!r}", lambda found: found != value)


def containing(part: object) -> Matcher:
    """Equals each text or collection that contains the part."""
    return Matcher(f"containing {part!r}", lambda whole: part in whole)


def one_of(*values: object) -> Matcher:
    """Equals each of these values."""
    return Matcher(f"one of {', '.join(map(repr, values))}", lambda value: value in values)


def matching(pattern: str) -> Matcher:
    """Equals each text that the regular expression matches somewhere."""
    return Matcher(f"matching {pattern!r}", lambda text: re.search(pattern, text) is not None)
