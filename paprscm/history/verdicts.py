# SPDX-License-Identifier: GPL-2.0-or-later
"""Verdicts and known issues of two sets of runs, and tests whose verdict is not steady."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from paprscm.history.statistics import fisher, wilson
from paprscm.results.record import Record, Status

Change = Literal["worse", "better", "changed", "varies"]
"""Of these, "varies" is no evidence: both sets could be samples of one rate."""

_RANKS: Final[dict[Status, int]] = {"PASS": 0, "WARN": 1, "FAIL": 2, "ERROR": 2}
"""The other statuses are no verdict."""
_FAILED = 2
_EVIDENCE: Final = 0.01
"""p-value at which the rates of failure differ."""


def change_by(gain: float) -> Change:
    """The change of a metric by its improvement, which is 0 if no direction is better."""
    return "better" if gain > 0 else "worse" if gain < 0 else "changed"


@dataclass(frozen=True, kw_only=True)
class VerdictChange:
    """A test whose verdicts differ.

    Attributes:
        test: name.
        change: what the difference means.
        a: number of runs by status, in the first set.
        b: in the second set.
    """

    test: str
    change: Change
    a: dict[Status, int]
    b: dict[Status, int]


@dataclass(frozen=True, kw_only=True)
class IssueChange:
    """A known issue that shows in one set and not in the other, or not as often.

    Attributes:
        name: of its file.
        title: its first line.
        change: "worse" for a new one, "better" for one that is gone.
        a: number of runs in which it showed, of those that looked for it.
        b: in the second set.
    """

    name: str
    title: str
    change: Change
    a: tuple[int, int]
    b: tuple[int, int]


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


def verdict_changes(a: Sequence[Record], b: Sequence[Record]) -> list[VerdictChange]:
    """The tests whose verdicts differ, the worse ones first."""
    one, two = _statuses(a), _statuses(b)
    changes = []
    for test in sorted(one.keys() & two.keys()):
        change = _verdict_change(one[test], two[test])
        if change is not None:
            a_counts, b_counts = ({**statuses} for statuses in (one[test], two[test]))
            changes.append(VerdictChange(test=test, change=change, a=a_counts, b=b_counts))
    order: tuple[Change, ...] = ("worse", "changed", "varies", "better")
    return sorted(changes, key=lambda change: (order.index(change.change), change.test))


def issue_changes(a: Sequence[Record], b: Sequence[Record]) -> list[IssueChange]:
    """The known issues that show in one set only, and those that show in some of its runs."""
    titles = {f.name: f.title for r in (*a, *b) for t in r.tests for f in t.known_issues}
    one, two = _showing(a), _showing(b)
    changes = []
    for name in sorted(titles):
        before, after = one.get(name, (0, 0)), two.get(name, (0, 0))
        # Equal rates; or a set that did not look for it.
        if before[0] * after[1] == after[0] * before[1]:
            continue
        change: Change = "worse" if after[0] * before[1] > before[0] * after[1] else "better"
        total = before[0] in (0, before[1]) and after[0] in (0, after[1])
        if not total and fisher(*before, *after) > _EVIDENCE:
            change = "varies"
        changes.append(IssueChange(name=name, title=titles[name], change=change, a=before, b=after))
    return changes


def only_in(a: Sequence[Record], b: Sequence[Record]) -> list[str]:
    """The tests with a verdict in the first set and none in the second."""
    return sorted(
        {name for name, statuses in _statuses(a).items() if statuses.keys() & _RANKS.keys()}
        - {name for name, statuses in _statuses(b).items() if statuses.keys() & _RANKS.keys()}
    )


def flaky_tests(verdicts: Iterable[tuple[str, str, str]]) -> list[Flaky]:
    """The tests whose verdict has changed, those that certainly change often first.

    Args:
        verdicts: returned by History.verdicts(). Conditions are equal if environment, parameters
            and suite are; other conditions may have been tested in between.
    """
    tests: dict[str, Flaky] = {}
    last: dict[tuple[str, str], str] = {}
    for test, conditions, status in verdicts:
        if status not in _RANKS:
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


def _statuses(records: Sequence[Record]) -> dict[str, Counter[Status]]:
    found: dict[str, Counter[Status]] = {}
    for record in records:
        for test in record.tests:
            found.setdefault(test.name, Counter())[test.status] += 1
    return found


def _verdict_change(a: Counter[Status], b: Counter[Status]) -> Change | None:
    one = [_RANKS[status] for status in a.elements() if status in _RANKS]
    two = [_RANKS[status] for status in b.elements() if status in _RANKS]
    if not one or not two or set(one) == set(two) == {one[0]}:
        return None
    failed = one.count(_FAILED), len(one), two.count(_FAILED), len(two)
    worse = failed[2] * failed[1] > failed[0] * failed[3]
    better = failed[2] * failed[1] < failed[0] * failed[3]
    is_separate = max(one) < min(two) or max(two) < min(one)
    if is_separate or fisher(*failed) <= _EVIDENCE:
        return "worse" if worse else "better" if better else "changed"
    return "varies"


def _showing(records: Sequence[Record]) -> dict[str, tuple[int, int]]:
    """By issue, the number of runs in which it showed, and of those that looked for it."""
    shown: Counter[str] = Counter()
    looked: Counter[str] = Counter()
    for record in records:
        findings = [finding for test in record.tests for finding in test.known_issues]
        looked.update({finding.name for finding in findings})
        shown.update({finding.name for finding in findings if finding.shows})
    return {name: (shown[name], count) for name, count in looked.items()}
