# SPDX-License-Identifier: GPL-2.0-or-later
"""Counts of a job: statuses by subject, and known issues."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from paprscm.results.record import Record, Status
from paprscm.results.text import one_line

ORDER: Final[tuple[Status, ...]] = (
    *("FAIL", "ERROR", "INTERRUPTED", "WARN", "PASS", "CANCEL", "SKIP"),
)
"""Statuses of a job that has ended, the worst first."""


@dataclass
class Subject:
    """The tests of one folder.

    Attributes:
        statuses: number of tests by status.
        duration_s: sum of their durations.
    """

    statuses: Counter[Status] = field(default_factory=Counter)
    duration_s: float = 0.0


@dataclass
class Issue:
    """A known issue that showed.

    Attributes:
        title: first line of its file.
        tests: number of tests in which it showed.
        versions: products and versions.
    """

    title: str
    tests: int = 0
    versions: set[str] = field(default_factory=set)


def subjects(record: Record) -> dict[str, Subject]:
    """The subjects of a job, by name."""
    found: dict[str, Subject] = {}
    for test in sorted(record.tests, key=lambda test: test.subject):
        subject = found.setdefault(one_line(test.subject), Subject())
        subject.statuses[test.status] += 1
        subject.duration_s += test.times.duration_s if test.times else 0.0
    return found


def statuses(record: Record) -> Counter[Status]:
    """Number of tests by status."""
    return Counter(test.status for test in record.tests)


def issues(record: Record) -> dict[str, Issue]:
    """The known issues that showed, by name."""
    found: dict[str, Issue] = {}
    for test in record.tests:
        for name, finding in {finding.name: finding for finding in test.shown}.items():
            issue = found.setdefault(one_line(name), Issue(one_line(finding.title)))
            issue.tests += 1
            issue.versions.add(one_line(f"{finding.product} {finding.version}"))
    return dict(sorted(found.items()))


def seconds(duration_s: float) -> str:
    """A duration for people: "4.2 s", "12 min 05 s"."""
    if duration_s < 100:
        return f"{duration_s:.1f} s"
    return f"{int(duration_s) // 60} min {int(duration_s) % 60:02} s"
