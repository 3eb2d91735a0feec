# SPDX-License-Identifier: GPL-2.0-or-later
"""The history of each test, what is broken, and known issues over all runs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from paprscm import known_issues
from paprscm.errors import Error
from paprscm.report.runs import Run, changes, is_verdict, page_key
from paprscm.results.record import BROKEN, Finding, Status, Test


@dataclass(frozen=True, kw_only=True)
class Streak:
    """Consecutive runs of a track in which a test had one status.

    Attributes:
        changes: differences between the environments of the run before and the first of these.
    """

    status: Status
    runs: tuple[Run, ...]
    changes: tuple[str, ...]

    @property
    def first(self) -> Run:
        """The oldest of the runs."""
        return self.runs[0]

    @property
    def last(self) -> Run:
        """The newest of the runs."""
        return self.runs[-1]


@dataclass(frozen=True, kw_only=True)
class Breakage:
    """A test that is broken in the newest runs of a track.

    Attributes:
        track: name of the track.
        since: the first run of those in which it is broken without a break.
        good: the last run before, in which it was not; None if there is none.
        newest: the newest run in which it is broken.
        broken: number of runs of the track in which it is broken.
        total: number of runs of the track in which it ran.
        streak: number of runs from `since` to `newest`.
        changes: differences between `good` and `since`.
    """

    track: str
    since: Run
    good: Run | None
    newest: Run
    broken: int
    total: int
    streak: int
    changes: tuple[str, ...]

    @property
    def is_unsteady(self) -> bool:
        """It was broken, then not, and is broken again."""
        return self.broken > self.streak


@dataclass(kw_only=True)
class History:
    """A test in all runs.

    Attributes:
        name: the same in all runs.
        key: name of its page.
        results: its runs in chronological order, with its part of their records.
    """

    name: str
    key: str
    results: list[tuple[Run, Test]] = field(default_factory=list)

    @property
    def newest(self) -> Test:
        """Its part of the newest run that has it."""
        return self.results[-1][1]

    @property
    def last_failure(self) -> tuple[Run, Test] | None:
        """The newest run in which it was broken."""
        return next((r for r in reversed(self.results) if is_broken(r[1])), None)

    @functools.cached_property
    def tracks(self) -> dict[str, list[tuple[Run, Test]]]:
        """Its results by track; the track with the newest run first."""
        found: dict[str, list[tuple[Run, Test]]] = {}
        for run, test in reversed(self.results):
            found.setdefault(run.track, []).append((run, test))
        return {track: results[::-1] for track, results in found.items()}

    def streaks(self, track: str) -> list[Streak]:
        """The streaks of a track, the newest first."""
        groups: list[list[tuple[Run, Test]]] = []
        for result in self.tracks[track]:
            if groups and groups[-1][-1][1].status == result[1].status:
                groups[-1].append(result)
            else:
                groups.append([result])
        streaks = []
        for before, group in zip([None, *groups], groups, strict=False):
            differences = changes(before[-1][0], group[0][0], self.name) if before else []
            streaks.append(
                Streak(
                    status=group[0][1].status,
                    runs=tuple(run for run, _ in group),
                    changes=tuple(differences),
                )
            )
        return streaks[::-1]

    def breakages(self) -> list[Breakage]:
        """The tracks in which it is broken, the oldest breakage first."""
        found = [self._breakage(track, results) for track, results in self.tracks.items()]
        return sorted(filter(None, found), key=lambda b: b.since.number)

    def _breakage(self, track: str, results: Sequence[tuple[Run, Test]]) -> Breakage | None:
        verdicts = [result for result in results if is_verdict(result[1])]
        passed = [index for index, (_, test) in enumerate(verdicts) if not is_broken(test)]
        streak = verdicts[passed[-1] + 1 :] if passed else verdicts
        if not streak:
            return None
        before = verdicts[passed[-1]][0] if passed else None
        return Breakage(
            track=track,
            since=streak[0][0],
            good=before,
            newest=streak[-1][0],
            broken=sum(is_broken(test) for _, test in verdicts),
            total=len(verdicts),
            streak=len(streak),
            changes=tuple(changes(before, streak[0][0], self.name)) if before else (),
        )


@dataclass(kw_only=True)
class Issue:
    """A known issue in all runs.

    Attributes:
        name: name of its file in known_issues/.
        finding: its newest finding; one in which it showed, if there is any.
        severity: of the file of this version of the suite; "" if there is none.
        shown: runs in which it showed, in chronological order.
        gone: as `shown`, for runs in which it was looked for and did not show in any test.
        versions: number of runs by version of the product in which it showed.
        gone_in: as `versions`, for versions in which it never showed.
        tests: names of the tests in which it showed.
    """

    name: str
    finding: Finding
    severity: str = ""
    shown: list[Run] = field(default_factory=list)
    gone: list[Run] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    gone_in: dict[str, int] = field(default_factory=dict)
    tests: set[str] = field(default_factory=set)


def is_broken(test: Test) -> bool:
    """True if the test ran and failed; a test that never started is not broken."""
    return test.status in BROKEN and is_verdict(test)


def histories(runs: Iterable[Run]) -> list[History]:
    """The tests of all runs, by subject and name."""
    found: dict[str, History] = {}
    for run in runs:
        for name, test in run.tests.items():
            history = found.get(name)
            if history is None:
                history = found[name] = History(name=name, key=page_key(name, name))
            history.results.append((run, test))
    return sorted(found.values(), key=lambda h: (h.newest.subject, h.name))


def issues(runs: Iterable[Run]) -> list[Issue]:
    """The known issues of all runs: those that showed first, by severity."""
    found: dict[str, Issue] = {}
    for run in runs:
        findings: dict[str, list[tuple[str, Finding]]] = {}
        for name, test in run.tests.items():
            for finding in test.known_issues:
                findings.setdefault(finding.name, []).append((name, finding))
        for name, pairs in findings.items():
            # An issue that shows in one test of a run is there, whatever other tests found.
            shows = [pair for pair in pairs if pair[1].shows]
            newest = (shows or pairs)[0][1]
            issue = found.setdefault(name, Issue(name=name, finding=newest))
            if shows or not issue.finding.shows:
                issue.finding = newest
            (issue.shown if shows else issue.gone).append(run)
            issue.tests.update(test for test, _ in shows)
            counts = issue.versions if shows else issue.gone_in
            for version in {finding.version for _, finding in shows or pairs}:
                counts[version] = counts.get(version, 0) + 1
    known = set(known_issues.names())
    for issue in found.values():
        issue.gone_in = {v: n for v, n in issue.gone_in.items() if v not in issue.versions}
        if issue.name in known:
            issue.severity = _severity(issue.name)
    severities = [*known_issues.SEVERITIES, ""]
    return sorted(found.values(), key=lambda i: (not i.shown, severities.index(i.severity), i.name))


def _severity(name: str) -> str:
    try:
        return known_issues.read_issue(name).severity
    except Error:
        return ""
