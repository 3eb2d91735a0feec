# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics of a test over runs, with the noise between runs and their lasting changes."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from paprscm.history.changes import SHORTEST, ChangePoint, change_points
from paprscm.history.metrics import Key
from paprscm.report.histories import History
from paprscm.report.runs import Run
from paprscm.results.labels import metric_label
from paprscm.results.record import Test

RUNS_FOR_NOISE: Final = 5
"""Number of runs from which the noise is known; fewer give a band of arbitrary width."""

DURATION: Final = "duration of the test"
"""Label of a test's duration, which is shown as a metric."""

MINIMUM_OF_DURATION: Final = 0.10
"""Smallest change of a duration that matters; it has one value a run, and the host's load in it."""

_Name = tuple[str, str, str]
"""Label, unit, and name without dimensions."""

_LARGEST = 1e300
_LARGEST_RATIO = 1e100
_SIGMA_OF_MAD = 1.4826
"""Ratio of the standard deviation to the median absolute deviation, for a normal distribution."""


@dataclass(frozen=True)
class Band:
    """Range in which a metric usually is: median ± 3 standard deviations of the runs' medians.

    That of a time or a rate is at least as wide as the smallest change that matters.

    The deviation is estimated from the median absolute deviation, so a few outliers do not widen
    the range that should reveal them.
    """

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Level:
    """Runs of a series between two lasting changes.

    Attributes:
        start: index of the first point.
        stop: index after the last point.
        median: of the points.
    """

    start: int
    stop: int
    median: float


@dataclass(kw_only=True)
class Series:
    """A metric of a test in the runs of one track on one kind of host.

    Attributes:
        key: its test, label and unit.
        place: name of the track, and of the host if there are several.
        points: run and the median of its repetitions, in chronological order.
    """

    key: Key
    place: str
    points: list[tuple[Run, float]] = field(default_factory=list)

    @property
    def newest(self) -> float:
        """The value of the newest run."""
        return self.points[-1][1]

    @property
    def is_duration(self) -> bool:
        """It is the duration of the test, not a metric."""
        return self.key.label == DURATION

    @property
    def minimum(self) -> float:
        """Smallest change that matters, as a share."""
        return MINIMUM_OF_DURATION if self.is_duration else self.key.minimum

    @functools.cached_property
    def can_change(self) -> bool:
        """A lasting change could be found: enough runs, and the values differ."""
        values = [value for _, value in self.points]
        if len(values) < SHORTEST:
            return False
        low, high = min(values), max(values)
        return 0 < low < high < low * _LARGEST_RATIO

    @functools.cached_property
    def changes(self) -> list[ChangePoint]:
        """The lasting changes in chronological order."""
        if not self.can_change:
            return []
        return change_points([value for _, value in self.points], self.minimum)

    @functools.cached_property
    def levels(self) -> list[Level]:
        """The runs between lasting changes; one level without any."""
        edges = [0, *(change.index for change in self.changes), len(self.points)]
        return [
            Level(start, stop, statistics.median(value for _, value in self.points[start:stop]))
            for start, stop in itertools.pairwise(edges)
        ]

    @functools.cached_property
    def band(self) -> Band | None:
        """That of the runs since the last lasting change; None below RUNS_FOR_NOISE runs."""
        level = self.levels[-1]
        values = [value for _, value in self.points[level.start :]]
        if len(values) < RUNS_FOR_NOISE:
            return None
        deviation = statistics.median([abs(value - level.median) for value in values])
        half = 3 * _SIGMA_OF_MAD * deviation
        # A count may be the same in all runs, and another one is a finding.
        if self.is_duration or self.key.direction:
            half = max(half, self.minimum * abs(level.median))
        return Band(level.median - half, level.median, level.median + half)

    @property
    def is_unusual(self) -> bool:
        """The newest value is outside the band."""
        band = self.band
        return band is not None and not band.low <= self.newest <= band.high


def series(history: History) -> list[Series]:
    """The metrics of a test by label, the place with the newest run first.

    Its duration is the first one.
    """
    places = place_names(run for run, _ in history.results)
    found: dict[tuple[_Name, str], Series] = {}
    for run, test in history.results:
        place = places[run]
        for name, values in _values(test).items():
            one = found.get((name, place))
            if one is None:
                key = Key(history.name, *name)
                one = found[name, place] = Series(key=key, place=place)
            one.points.append((run, values[0] if len(values) == 1 else statistics.median(values)))
    return sorted(
        found.values(),
        key=lambda s: (not s.is_duration, s.key.label, -s.points[-1][0].number),
    )


def place_names(runs: Iterable[Run]) -> dict[Run, str]:
    """The track of each run, and its host if there are several."""
    hosts = {run: run.host for run in runs}
    several = len(set(hosts.values())) > 1
    return {run: f"{run.track}, {host}" if several else run.track for run, host in hosts.items()}


def _values(test: Test) -> dict[_Name, list[float]]:
    values: dict[_Name, list[float]] = {}
    # The duration of a test that broke or was cancelled measures something else.
    if test.times is not None and test.status in ("PASS", "WARN"):
        values[DURATION, "s", DURATION] = [test.times.duration_s]
    for metric in test.metrics:
        # The arithmetic of a band would overflow.
        if abs(metric.value) > _LARGEST:
            continue
        name = (metric_label(metric), metric.unit, metric.name)
        values.setdefault(name, []).append(metric.value)
    return values


def number(value: float) -> str:
    """A number with four significant digits: "0.1599", "1234", "1.2e+07"."""
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{value:.4g}"


def by_label(found: Iterable[Series]) -> dict[tuple[str, str], list[Series]]:
    """The series of each metric, by label and unit."""
    groups: dict[tuple[str, str], list[Series]] = {}
    for one in found:
        groups.setdefault((one.key.label, one.key.unit), []).append(one)
    return groups
