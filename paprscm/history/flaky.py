# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests whose verdict changes although nothing else has changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from paprscm.history.statistics import wilson

_VERDICTS: Final = ("PASS", "WARN", "FAIL", "ERROR")
"""The other statuses are no verdict."""


@dataclass(kw_only=True)
class Flaky:
    """A test with changes of its verdict.

    Attributes:
        test: name.
        changes: number of consecutive runs in equal conditions with different verdicts.
        pairs: number of consecutive runs in equal conditions.
        statuses: number of runs by verdict.
    """

    test: str
    changes: int = 0
    pairs: int = 0
    statuses: Counter[str] = field(default_factory=Counter)

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of 95 % of the rate of changes."""
        return wilson(self.changes, self.pairs)


def flaky_tests(verdicts: Iterable[tuple[str, str, str]]) -> list[Flaky]:
    """The tests whose verdict has changed, those that certainly change often first.

    Args:
        verdicts: returned by History.verdicts(). Conditions are equal if environment, parameters
            and suite are; other conditions may have been tested in between.
    """
    tests: dict[str, Flaky] = {}
    last: dict[tuple[str, str], str] = {}
    for test, conditions, status in verdicts:
        if status not in _VERDICTS:
            continue
        own = tests.setdefault(test, Flaky(test=test))
        own.statuses[status] += 1
        before = last.get((test, conditions))
        if before is not None:
            own.pairs += 1
            own.changes += before != status
        last[test, conditions] = status
    found = [one for one in tests.values() if one.changes]
    return sorted(found, key=lambda one: (-one.interval[0], one.test))
