# SPDX-License-Identifier: GPL-2.0-or-later
"""Lasting changes of metrics: size, position and possible causes, with their uncertainty."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from paprscm.history.conditions import conditions_of_test
from paprscm.history.statistics import LEVEL, benjamini_hochberg
from paprscm.history.verdicts import Change, change_by
from paprscm.report.metrics import Series
from paprscm.report.runs import Run, changes

_OTHERS: Final = ("settings", "parameters", "memory", "start of guests", "machine")
"""Conditions that runs.changes() does not name, and that can change a metric."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shift:
    """A lasting change of a metric.

    Attributes:
        series: the metric in its place.
        change: its meaning.
        size: relative change.
        low: lower end of its interval of 95 %.
        high: upper end.
        before: the run before the change.
        first: the first run after the change.
        outside: the last run before the interval of the position.
        beyond: the first run after it, or `latest` if there is none.
        earliest: first run of the interval of 95 % of `first`.
        latest: last run of the interval.
        changed: differences between the conditions of `before` and `first`.
        changed_near: further differences between the two ends of the interval.
        p: probability of such a change in a series without any.
    """

    series: Series
    change: Change
    size: float
    low: float
    high: float
    before: Run
    first: Run
    outside: Run
    beyond: Run
    earliest: Run
    latest: Run
    changed: tuple[str, ...]
    changed_near: tuple[str, ...]
    p: float

    @property
    def is_exact(self) -> bool:
        """The interval of the position is one run."""
        return self.earliest is self.latest


@dataclass(frozen=True, kw_only=True)
class Group:
    """Lasting changes in one place that can have happened in the same run.

    Attributes:
        lead: the change that describes the group.
        shifts: all changes, the lead first, then the most certain ones.
    """

    lead: Shift
    shifts: tuple[Shift, ...]

    @functools.cached_property
    def changed_near(self) -> tuple[str, ...]:
        """Differences within the intervals of all changes, without those of the lead's position."""
        near = (words for s in self.shifts for words in (*s.changed, *s.changed_near))
        return tuple(words for words in dict.fromkeys(near) if words not in self.lead.changed)

    def counts_after(self, number: int) -> str:
        """The changes but the first ones, counted: "12 worse, 1 better"."""
        counts = Counter(shift.change for shift in self.shifts[number:])
        return ", ".join(f"{count} {change}" for change, count in counts.most_common())


def shifts(series: Iterable[Series]) -> list[Shift]:
    """The lasting changes of series, the newest first."""
    found = [_shift(one, index) for one in series for index in range(len(one.changes))]
    return sorted(found, key=lambda s: (-s.first.number, s.series.key, s.series.place))


def certain(series: Iterable[Series], found: Iterable[Shift]) -> list[Group]:
    """The groups of changes that are not chance among so many series, the newest first.

    A change is kept if Benjamini and Hochberg's correction accepts it with the changes of its
    group and the number of all series. Changes elsewhere do not count: they would let a single
    change pass whose p-value is common among all series. Durations are a family of their own,
    because each test has one.

    Args:
        series: all of the site.
        found: their changes.
    """
    families = Counter(one.is_duration for one in series if one.can_change)
    kept = []
    for group in groups(found):
        own: list[Shift] = []
        for is_duration, total in families.items():
            family = [s for s in group.shifts if s.series.is_duration == is_duration]
            others = [1.0] * (total - len(family))
            q_values = benjamini_hochberg([*(s.p for s in family), *others])
            own += [s for s, q in zip(family, q_values, strict=False) if q <= LEVEL]
        kept += groups(own)
    return sorted(kept, key=_newest_first)


def groups(found: Iterable[Shift]) -> list[Group]:
    """Changes that can have happened in the same run of a place, the newest group first.

    The run that most intervals contain makes the first group of a place, then that of the rest.
    One of 20 intervals does not contain the run of its change, so an interval that ends a run
    earlier or later belongs to the group.
    """
    by_place: dict[str, list[Shift]] = {}
    for shift in found:
        by_place.setdefault(shift.series.place, []).append(shift)
    made = []
    for rest in by_place.values():
        while rest:
            firsts = Counter(shift.first.number for shift in rest)
            run = max(firsts, key=lambda n: (sum(_contains(s, n) for s in rest), firsts[n], n))
            group = [s for s in rest if s.outside.number <= run <= s.beyond.number]
            group.sort(key=lambda s: (s.first.number != run, s.p, s.series.key))
            made.append(Group(lead=group[0], shifts=tuple(group)))
            rest = [shift for shift in rest if shift not in group]
    return sorted(made, key=_newest_first)


def _newest_first(group: Group) -> tuple[int, str]:
    return -group.lead.first.number, group.lead.series.place


def _contains(shift: Shift, number: int) -> bool:
    """The change can have happened in the run with this number."""
    return shift.earliest.number <= number <= shift.latest.number


def percent(value: float) -> str:
    """A relative change: "+19.8 %"; "unknown" if it is not finite."""
    if not math.isfinite(value):
        return "unknown"
    digits = 0 if abs(value) >= 1 else 1
    return f"{100 * value:+.{digits}f} %".replace("-", "\N{MINUS SIGN}")


def _shift(series: Series, number: int) -> Shift:
    point = series.changes[number]
    runs = [run for run, _ in series.points]
    before, first = runs[point.index - 1], runs[point.index]
    outside, latest = runs[point.earliest - 1], runs[point.latest]
    changed = _differences(before, first, series.key.test)
    is_exact = outside is before and latest is first
    near = [] if is_exact else _differences(outside, latest, series.key.test)
    return Shift(
        series=series,
        change=change_by(point.shift * series.key.direction),
        size=point.shift,
        low=point.low,
        high=point.high,
        before=before,
        first=first,
        outside=outside,
        beyond=runs[min(point.latest + 1, len(runs) - 1)],
        earliest=runs[point.earliest],
        latest=latest,
        changed=tuple(changed),
        changed_near=tuple(words for words in near if words not in changed),
        p=point.p,
    )


def _differences(before: Run, after: Run, name: str) -> list[str]:
    """The differences between the conditions of a test in two runs, in a few words each."""
    words = changes(before, after, name)
    old, new = (_conditions(run, name) for run in (before, after))
    words += [
        f"{label} {old.get(label) or 'none'} → {new.get(label) or 'none'}"
        for label in _OTHERS
        if old.get(label) != new.get(label)
    ]
    kernels = [run.record.host.kernel for run in (before, after)]
    if kernels[0] != kernels[1]:
        words.append(f"kernel of the host {kernels[0]} → {kernels[1]}")
    return words


def _conditions(run: Run, name: str) -> dict[str, str]:
    test = run.tests[name]
    return conditions_of_test(run.record, run.record.environment(test))
