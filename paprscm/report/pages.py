# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages of a site, as HTML and as data for its scripts."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jinja2
import markupsafe

from paprscm.history.comparison import MetricResult
from paprscm.report.histories import Breakage, History, Issue, is_broken
from paprscm.report.metrics import Series, by_label, number, series
from paprscm.report.runs import (
    Run,
    branch,
    changes,
    describe_all,
    harmless,
    has_started,
    natural,
    page_key,
    rank,
    release,
)
from paprscm.report.shifts import Shift, certain, percent, shifts
from paprscm.report.versions import short_id, versions
from paprscm.results import tally
from paprscm.results.record import Record, Status, Test
from paprscm.results.text import one_line, shortened

Console = Callable[[Record, Test], Sequence[str]]
"""The last lines of a test's console."""

LETTERS: Final[dict[Status, str]] = {
    **{"PASS": "p", "WARN": "w", "FAIL": "f", "ERROR": "e", "INTERRUPTED": "i"},
    **{"CANCEL": "c", "SKIP": "s"},
}
NO_RESULT: Final = "-"
"""Letter of a test that a run does not have, or that never started there."""

NOT_STARTED: Final = "NOT STARTED"
"""Label of the tests that a killed job did not reach, instead of their status."""

_BROKEN_LIMIT: Final = 50
_STREAK_LIMIT: Final = 30
_GROUP_LIMIT: Final = 5
_SHIFT_LIMIT: Final = 3
_METRIC_LIMIT: Final = 20


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A row of the overview: a broken test and where it is broken."""

    history: History
    test: Test
    breakages: list[Breakage]
    tracks: int
    """Number of tracks in which it ran."""


@dataclass(frozen=True, kw_only=True)
class Track:
    """A row of the overview: the newest run of a track, and the tests that are broken there."""

    name: str
    newest: Run
    runs: int
    broken: int


@dataclass(frozen=True, kw_only=True)
class Change:
    """A test whose status differs between two runs."""

    name: str
    before: Status
    after: Status


class Site:
    """Renders the pages; each file is a path relative to the site, and its text."""

    def __init__(
        self,
        runs: Sequence[Run],
        tests: Sequence[History],
        issues: Sequence[Issue],
        console: Console,
    ) -> None:
        self.runs, self.tests, self.issues, self._console = runs, tests, issues, console
        self._keys = {history.name: history.key for history in tests}
        self._breakages = {history.name: history.breakages() for history in tests}
        self._series = {history.name: series(history) for history in tests}
        self._shifts = {name: shifts(found) for name, found in self._series.items()}
        # A link for each row of all runs; format() escapes.
        link = markupsafe.Markup('<a class="name" href="../tests/{}.html">{}</a>')
        self._links = {h.name: link.format(h.key, harmless(h.name)) for h in tests}
        # The track with the newest run first.
        self._tracks = list(dict.fromkeys(run.track for run in reversed(runs)))
        self._environment = jinja2.Environment(
            loader=jinja2.PackageLoader("paprscm.report"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            # All that a template prints is made plain text of bounded length here, then escaped.
            finalize=_finalize,
        )
        self._environment.filters.update(
            effect=_effect,
            middle=statistics.median,
            number=number,
            percent=percent,
            seconds=tally.seconds,
            short=_short,
            spans=_spans,
        )
        self._environment.globals.update(
            keys=self._keys, links=self._links, statuses=tally.ORDER, issue_keys=_issue_keys(issues)
        )

    def files(self) -> Iterator[tuple[str, str]]:
        """All pages and data of the site."""
        found = versions(self.runs)
        changed_first = sorted(found, key=lambda one: not one.changed)
        yield "index.html", self._page("index", "", versions=changed_first, **self._overview())
        yield "runs.html", self._page("runs", "", runs=self.runs[::-1], counts_of=_counts)
        yield (
            "compare.html",
            self._page("compare", "", versions=found, metric_limit=_METRIC_LIMIT),
        )
        yield "issues.html", self._page("issues", "", issues=self.issues, total=len(self.runs))
        yield "data/index.js", _script("index", self._index())
        previous: dict[str, Run] = {}
        for run in self.runs:
            page = self._page("run", "../", **self._run(run, previous.get(run.track)))
            yield f"runs/{run.key}.html", page
            previous[run.track] = run
        for position, history in enumerate(self.tests):
            yield from self._test(position, history)

    def _page(self, name: str, root: str, **values: Any) -> str:
        return self._environment.get_template(f"{name}.html").render(
            root=root, current=name, **values
        )

    def _overview(self) -> dict[str, Any]:
        rows = [
            Broken(
                history=history,
                # The test as it broke most lately.
                test=max(found, key=lambda b: b.newest.number).newest.tests[history.name],
                breakages=found,
                tracks=len(history.tracks),
            )
            for history in self.tests
            if (found := self._breakages[history.name])
        ]
        rows.sort(key=lambda row: row.breakages[0].since.number, reverse=True)
        counts = Counter(b.track for found in self._breakages.values() for b in found)
        newest = {run.track: run for run in self.runs}
        runs = Counter(run.track for run in self.runs)
        tracks = [
            Track(name=name, newest=newest[name], runs=runs[name], broken=counts[name])
            for name in self._tracks
        ]
        return {
            **{"broken": rows[:_BROKEN_LIMIT], "broken_total": len(rows), "tracks": tracks},
            **{"counts_of": _counts, "runs": self.runs, "tests": self.tests},
            "groups": certain(
                (one for own in self._series.values() for one in own),
                (shift for own in self._shifts.values() for shift in own),
            ),
            **{"group_limit": _GROUP_LIMIT, "shift_limit": _SHIFT_LIMIT},
        }

    def _run(self, run: Run, previous: Run | None) -> dict[str, Any]:
        tests = sorted(run.tests.values(), key=lambda test: (rank(test.status), test.name))
        groups: dict[str, list[Test]] = {}
        for test in tests:
            groups.setdefault(_label(test), []).append(test)
        return {
            **{"run": run, "groups": groups, "counts": _counts(run), "previous": previous},
            "changed": _changed(previous, run) if previous else [],
            "differences": changes(previous, run, "") if previous else [],
            "issues": tally.issues(run.record),
            "subjects": tally.subjects(run.record),
            "description": describe_all(run),
            "is_broken": is_broken,
        }

    def _test(self, position: int, history: History) -> Iterator[tuple[str, str]]:
        measured, own_shifts = self._series[history.name], self._shifts[history.name]
        metrics = by_label(measured)
        newest = sorted(measured, key=lambda one: -one.points[-1][0].number)
        places = list(dict.fromkeys(one.place for one in newest))
        failure = history.last_failure
        yield (
            f"tests/{history.key}.html",
            self._page(
                "test",
                "../",
                position=position,
                history=history,
                test=history.newest,
                breakages=self._breakages[history.name],
                broken_tracks={b.track for b in self._breakages[history.name]},
                streaks={track: history.streaks(track) for track in history.tracks},
                streak_limit=_STREAK_LIMIT,
                failure=failure,
                console=self._console(failure[0].record, failure[1]) if failure else (),
                metrics=metrics,
                shifts=own_shifts,
            ),
        )
        data: dict[str, Any] = {"places": [harmless(place) for place in places]}
        data["metrics"] = [
            {
                "label": harmless(label),
                "unit": harmless(unit),
                "series": [_series_data(one, places.index(one.place), own_shifts) for one in group],
            }
            for (label, unit), group in metrics.items()
        ]
        yield f"data/{history.key}.js", _script("metrics", data)

    def _index(self) -> dict[str, Any]:
        """The verdicts of all tests in all runs, a character each."""
        cells = {history.name: [NO_RESULT] * len(self.runs) for history in self.tests}
        for run in self.runs:
            for name, test in run.tests.items():
                if has_started(test):
                    cells[name][run.number] = LETTERS[test.status]
        return {
            "statuses": {letter: status for status, letter in LETTERS.items()},
            "tracks": [harmless(track) for track in self._tracks],
            "runs": [
                [
                    *(run.key, run.time, self._tracks.index(run.track), harmless(run.versions)),
                    harmless(short_id(run)),
                ]
                for run in self.runs
            ],
            "tests": [
                [harmless(test.name), test.key, harmless(test.newest.subject)]
                for test in self.tests
            ],
            "cells": ["".join(cells[test.name]) for test in self.tests],
            "broken": [
                position for position, test in enumerate(self.tests) if self._breakages[test.name]
            ],
        }


def _series_data(one: Series, place: int, found: Iterable[Shift]) -> dict[str, Any]:
    """A metric in one place, for the plot; runs are numbers. `found` has the test's changes."""
    runs = [run.number for run, _ in one.points]
    data: dict[str, Any] = {
        "place": place,
        "runs": runs,
        "values": [value for _, value in one.points],
        "band": (band := one.band) and [band.low, band.median, band.high],
    }
    if one.changes:
        data["levels"] = [
            [runs[level.start], runs[level.stop - 1], level.median] for level in one.levels
        ]
        # Each change is between two runs: the ends of its interval, and its description.
        data["changes"] = [
            [shift.outside.number, shift.latest.number, _sentence(shift)] for shift in shifts([one])
        ]
    return data


def _sentence(shift: Shift) -> str:
    """Size and position of a change, without its causes."""
    low, high = percent(shift.low), percent(shift.high)
    position = f"from {shift.first.time} on"
    if not shift.is_exact:
        position += f" (95 %: {shift.earliest.time} to {shift.latest.time})"
    return f"{shift.change}: {percent(shift.size)} (95 %: {low} to {high}) {position}"


def _issue_keys(issues: Iterable[Issue]) -> dict[str, str]:
    """The place of each known issue on its page, by name, and by the name as one line."""
    return {
        name: page_key(issue.name, issue.name)
        for issue in issues
        for name in (issue.name, one_line(issue.name))
    }


def _changed(before: Run, after: Run) -> list[Change]:
    """The tests of both runs whose status differs, the worst ones first."""
    found = [
        Change(name=name, before=before.tests[name].status, after=test.status)
        for name, test in after.tests.items()
        if name in before.tests
        and before.tests[name].status != test.status
        and has_started(test)
        and has_started(before.tests[name])
    ]
    return sorted(found, key=lambda c: (rank(c.after), rank(c.before), c.name))


def _counts(run: Run) -> dict[str, int]:
    """Number of tests by status, the worst one first; only statuses that occur."""
    counts = Counter(map(_label, run.tests.values()))
    return {label: counts[label] for label in (*tally.ORDER, NOT_STARTED) if counts[label]}


def _label(test: Test) -> str:
    return test.status if has_started(test) else NOT_STARTED


def _effect(result: MetricResult, value: float | None) -> str:
    """A change of a metric, or an end of its interval."""
    if value is None:
        return "unknown"
    if result.is_relative:
        return percent(value)
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}")


def _spans(versions: dict[str, int]) -> list[str]:
    """Versions and their numbers of runs, one entry for each branch: "6.12.107 to 6.12.117"."""
    branches: dict[str, list[str]] = {}
    for version in versions:
        branches.setdefault(branch(version), []).append(version)
    spans = []
    for _, found in sorted(branches.items(), key=lambda item: natural(item[0])):
        found.sort(key=natural)
        ends = " to ".join(dict.fromkeys(map(release, (found[0], found[-1]))))
        count = sum(versions[version] for version in found)
        spans.append(f"{ends}, {count} run{'s' * (count != 1)}")
    return spans


def _short(text: str, limit: int = 160) -> str:
    """The beginning of a text, as one line."""
    return shortened(one_line(harmless(text)), limit)


def _finalize(value: Any) -> Any:
    if isinstance(value, markupsafe.Markup) or not isinstance(value, str):
        return value
    return harmless(value)


def _script(name: str, data: Any) -> str:
    """A script that hands data to the page: JSON in ASCII, without "<"."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'paprscm.load("{name}",{text});\n'
