# SPDX-License-Identifier: GPL-2.0-or-later
"""Comparison of two sets of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from paprscm.errors import ConfigError
from paprscm.history import conditions
from paprscm.history.metrics import REFERENCE, Key, find_reference, normalized, run_medians
from paprscm.history.runs import run_id
from paprscm.history.statistics import Judgement, Sample, enough, judge
from paprscm.history.verdicts import (
    Change,
    IssueChange,
    VerdictChange,
    change_by,
    issue_changes,
    only_in,
    verdict_changes,
)
from paprscm.results.record import Record

WORSE = 1
NOT_COMPARABLE = 2
NOISE_UNKNOWN = "noise unknown"
"""Beginning of the obstacle that `anyway` does not overcome."""
_LARGEST_LOG = 700.0
"""Beyond it, exp() overflows."""


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """A metric in both sets.

    Attributes:
        test: name of the test; "" for a metric of the whole run.
        metric: name and dimensions.
        unit: unit.
        change: None if it has not moved by more than its minimum.
        a: run medians of the first set.
        b: run medians of the second set.
        is_relative: the following numbers are relative to the first set, else in units.
        minimum: the smallest change that matters.
        shift: the change.
        low: lower end of its interval of 95 %; None for sets that are too small.
        high: upper end.
        q: p-value, corrected for the number of metrics.
        detectable: the smallest change that would have been found with a probability of 80 %; None
            if no change would.
    """

    test: str
    metric: str
    unit: str
    change: Change | None
    a: tuple[float, ...]
    b: tuple[float, ...]
    is_relative: bool
    minimum: float
    shift: float
    low: float | None
    high: float | None
    q: float
    detectable: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two sets of runs.

    Attributes:
        a: ids of the runs of the first set.
        b: ids of the runs of the second set.
        differences: conditions that differ, with their values.
        obstacles: reasons why the sets are not comparable.
        warnings: reasons for caution.
        verdicts: tests whose verdicts differ.
        issues: known issues that differ.
        gone: tests with a verdict in the first set only.
        new: tests with a verdict in the second set only.
        reference: the metric by which times and rates are normalized; "" without one.
        metrics: the most certain changes first, without metrics that are equal in all runs; empty
            if the sets are not comparable.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    differences: dict[str, tuple[str, str]]
    obstacles: tuple[str, ...]
    warnings: tuple[str, ...]
    verdicts: tuple[VerdictChange, ...]
    issues: tuple[IssueChange, ...]
    gone: tuple[str, ...]
    new: tuple[str, ...]
    reference: str = ""
    metrics: tuple[MetricResult, ...] = field(default=())

    @property
    def status(self) -> int:
        """Exit status: 0 if nothing is worse, 1 if something is, 2 if they are not comparable."""
        if self.obstacles:
            return NOT_COMPARABLE
        return WORSE if "worse" in self.changes else 0

    @property
    def detectable(self) -> tuple[float, float, float] | None:
        """Relative changes that would have been found with a probability of 80 %.

        Of the metric that is better than nine of ten, of a typical one, and of the one that is
        worse than nine of ten; None if no change of any metric would have been found.
        """
        limits = sorted(
            r.detectable for r in self.metrics if r.is_relative and r.detectable is not None
        )
        if not limits:
            return None
        return limits[len(limits) // 10], median(limits), limits[9 * len(limits) // 10]

    @property
    def changes(self) -> list[Change]:
        """All changes of verdicts, known issues and metrics."""
        found = [
            *(verdict.change for verdict in self.verdicts),
            *(issue.change for issue in self.issues),
            *(result.change for result in self.metrics),
        ]
        return [change for change in found if change is not None]


def compare(
    a: Sequence[Record],
    b: Sequence[Record],
    *,
    reference: str = REFERENCE,
    minimum: float | None = None,
    anyway: bool = False,
) -> Comparison:
    """Compare two sets of runs.

    Args:
        a: the first set.
        b: the second set; no run may be in both.
        reference: name of a metric that measures the speed of the host in each run; times and
            rates are normalized by it if all runs have it. The default one may be absent.
        minimum: relative change that matters, instead of that of each metric.
        anyway: conditions that must be equal may differ.

    Raises:
        ConfigError: a run is given twice, or the reference is not one metric.
    """
    _check_distinct(a, b)
    different = conditions.differences(a[0], b[0])
    obstacles, warnings = _conditions(a, b, different)
    if anyway:
        obstacles, warnings = [], [*obstacles, *warnings]
    if not enough(len(a), len(b)):
        obstacles.append(
            f"{NOISE_UNKNOWN}: {len(a)} against {len(b)} runs, and at least 4 against 4 are needed"
        )
    medians = run_medians([*a, *b])
    key = _reference(medians, reference)
    if key is not None and (missing := sum(not (v and v > 0) for v in medians[key])):
        warnings.append(f"not normalized, runs without the metric {key.label}: {missing}")
        key = None
    if key is not None:
        medians = normalized(medians, key)
    results = [] if obstacles else _compare_metrics(medians, len(a), minimum)
    for result in results:
        is_reference = key is not None and (result.test, result.metric) == (key.test, key.label)
        if is_reference and result.change:
            warnings.append(
                f"the reference has changed by {result.shift:+.1%}: by the load of the host, or by "
                "what is compared"
            )
    return Comparison(
        a=tuple(map(run_id, a)),
        b=tuple(map(run_id, b)),
        differences=different,
        obstacles=tuple(obstacles),
        warnings=tuple(warnings),
        verdicts=tuple(verdict_changes(a, b)),
        issues=tuple(issue_changes(a, b)),
        gone=tuple(only_in(a, b)),
        new=tuple(only_in(b, a)),
        reference=key.label if key else "",
        metrics=tuple(results),
    )


def _check_distinct(a: Sequence[Record], b: Sequence[Record]) -> None:
    ids = [run_id(record) for record in (*a, *b)]
    for id_ in ids:
        if ids.count(id_) > 1:
            raise ConfigError(f"run {id_} is given twice")


def _reference(medians: Mapping[Key, object], name: str) -> Key | None:
    keys = find_reference(medians, name)
    if len(keys) > 1 or (not keys and name != REFERENCE):
        fact = ", ".join(repr(key.label) for key in keys[:3]) or "no time or rate has this name"
        raise ConfigError(f"--reference={name} is not one metric: {fact}")
    return keys[0] if keys else None


def _conditions(
    a: Sequence[Record], b: Sequence[Record], different: Mapping[str, object]
) -> tuple[list[str], list[str]]:
    """The obstacles and the warnings that follow from the conditions of the runs."""
    obstacles: list[str] = []
    warnings: list[str] = []
    for name, records in (("the first set", a), ("the second set", b)):
        for condition, values in conditions.mixed(records).items():
            text = f"{name} mixes runs with different {condition}: {'; '.join(values)}"
            (warnings if condition == "suite" else obstacles).append(text)
        killed = sum(record.job.end is None for record in records)
        if killed:
            warnings.append(f"{name} has runs that were interrupted: {killed} of {len(records)}")
    for condition in conditions.NEVER_COMPARED:
        if condition in different:
            obstacles.append(f"the sets differ in their {condition}")
    if "suite" in different:
        warnings.append("the sets differ in the commit of the suite: a test may have changed")
    causes = conditions.subjects(
        [name for name in different if name not in (*conditions.NEVER_COMPARED, "suite")]
    )
    if len(causes) > 1:
        warnings.append(
            f"the sets differ in {', '.join(causes)}: a change cannot be attributed to one of them"
        )
    return obstacles, warnings


def _compare_metrics(
    medians: Mapping[Key, Sequence[float | None]], first: int, minimum: float | None
) -> list[MetricResult]:
    pairs = {}
    for key, values in medians.items():
        a = tuple(value for value in values[:first] if value is not None)
        b = tuple(value for value in values[first:] if value is not None)
        # A metric that is the same in all runs is no hypothesis.
        if enough(len(a), len(b)) and len({*a, *b}) > 1:
            pairs[key] = (a, b)
    keys = sorted(pairs)
    samples = [_sample(*pairs[key], key.minimum if minimum is None else minimum) for key in keys]
    results = [
        _result(key, *pairs[key], sample, judgement)
        for key, sample, judgement in zip(keys, samples, judge(samples), strict=True)
    ]
    return sorted(results, key=lambda result: (result.q, -abs(result.shift)))


def _result(
    key: Key, a: tuple[float, ...], b: tuple[float, ...], sample: Sample, judgement: Judgement
) -> MetricResult:
    is_relative = _is_relative(a, b)

    def effect(value: float) -> float:
        return math.expm1(min(value, _LARGEST_LOG)) if is_relative else value

    def end(value: float) -> float | None:
        return effect(value) if math.isfinite(value) else None

    change: Change | None = None
    if judgement.is_significant:
        # The means decide, as in the test.
        change = change_by((fmean(sample.b) - fmean(sample.a)) * key.direction)
    return MetricResult(
        test=key.test,
        metric=key.label,
        unit=key.unit,
        change=change,
        a=a,
        b=b,
        is_relative=is_relative,
        minimum=effect(sample.minimum),
        shift=effect(judgement.shift),
        low=end(judgement.low),
        high=end(judgement.high),
        q=judgement.q,
        detectable=end(judgement.detectable),
    )


def _is_relative(a: Sequence[float], b: Sequence[float]) -> bool:
    return min(*a, *b) > 0


def _sample(a: Sequence[float], b: Sequence[float], minimum: float) -> Sample:
    """Logarithms; or the values themselves if one is not positive."""
    if _is_relative(a, b):
        return Sample(
            a=[math.log(v) for v in a], b=[math.log(v) for v in b], minimum=math.log1p(minimum)
        )
    return Sample(a=a, b=b, minimum=minimum * abs(median([*a, *b])))
