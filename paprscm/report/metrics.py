# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics of a test over runs, with the noise between runs."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from paprscm.report.histories import History
from paprscm.report.runs import Run
from paprscm.results.labels import metric_label
from paprscm.results.record import Test

RUNS_FOR_NOISE: Final = 5
"""Number of runs from which the noise is known; fewer give a band of arbitrary width."""

DURATION: Final = "duration of the test"
"""Label of a test's duration, which is shown as a metric."""

_LARGEST = 1e300
_SIGMA_OF_MAD = 1.4826
"""Ratio of the standard deviation to the median absolute deviation, for a normal distribution."""


@dataclass(frozen=True)
class Band:
    """Range in which a metric usually is: median ± 3 standard deviations of the runs' medians.

    The deviation is estimated from the median absolute deviation, so a few outliers do not widen
    the range that should reveal them.
    """

    low: float
    median: float
    high: float


@dataclass(kw_only=True)
class Series:
    """A metric of a test in the runs of one track on one kind of host.

    Attributes:
        place: name of the track, and of the host if there are several.
        points: run and the median of its repetitions, in chronological order.
    """

    label: str
    unit: str
    place: str
    points: list[tuple[Run, float]] = field(default_factory=list)

    @property
    def newest(self) -> float:
        """The value of the newest run."""
        return self.points[-1][1]

    @functools.cached_property
    def band(self) -> Band | None:
        """None with fewer than RUNS_FOR_NOISE runs."""
        if len(self.points) < RUNS_FOR_NOISE:
            return None
        values = [value for _, value in self.points]
        median = statistics.median(values)
        deviation = statistics.median([abs(value - median) for value in values])
        half = 3 * _SIGMA_OF_MAD * deviation
        return Band(median - half, median, median + half)

    @property
    def is_unusual(self) -> bool:
        """The newest value is outside the band."""
        band = self.band
        return band is not None and not band.low <= self.newest <= band.high


def series(history: History) -> list[Series]:
    """The metrics of a test by label, the place with the newest run first.

    Its duration is the first one.
    """
    hosts = {run.host for run, _ in history.results}
    found: dict[tuple[str, str, str], Series] = {}
    for run, test in history.results:
        place = f"{run.track}, {run.host}" if len(hosts) > 1 else run.track
        for (label, unit), values in _values(test).items():
            key = (label, unit, place)
            one = found.get(key)
            if one is None:
                one = found[key] = Series(label=label, unit=unit, place=place)
            one.points.append((run, statistics.median(values)))
    return sorted(
        found.values(), key=lambda s: (s.label != DURATION, s.label, -s.points[-1][0].number)
    )


def _values(test: Test) -> dict[tuple[str, str], list[float]]:
    values: dict[tuple[str, str], list[float]] = {}
    # The duration of a test that broke or was cancelled measures something else.
    if test.times is not None and test.status in ("PASS", "WARN"):
        values[DURATION, "s"] = [test.times.duration_s]
    for metric in test.metrics:
        # The arithmetic of a band would overflow.
        if abs(metric.value) > _LARGEST:
            continue
        values.setdefault((metric_label(metric), metric.unit), []).append(metric.value)
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
        groups.setdefault((one.label, one.unit), []).append(one)
    return groups
