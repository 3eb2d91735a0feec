# SPDX-License-Identifier: GPL-2.0-or-later
"""Change points of a long series of run medians.

Binary segmentation by the largest standardized rank-sum over all splits, with its p-value (B.
Lausen, M. Schumacher, Maximally selected rank statistics, Biometrics 48:73, 1992). Ranks make
outliers harmless. The interval of a position is the set of splits that a likelihood ratio of the
ranks does not reject (B. E. Hansen, Econometrica 68:575, 2000).

The points must be independent: a series that drifts with its host has to be normalized by a
reference first (metrics.normalized()).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from paprscm.history.statistics import hodges_lehmann

SHORTEST: Final = 14
"""Points of a series in which a change can be found."""
_SIDE: Final = 4
"""Points on each side of a change."""
_LEVEL: Final = 0.02
_RATIO: Final = -2 * math.log(1 - math.sqrt(0.95))
"""Quantile of the likelihood ratio: P(ratio < x) = (1 - exp(-x / 2))²."""


@dataclass(frozen=True, kw_only=True)
class ChangePoint:
    """A lasting change of a metric.

    Attributes:
        index: of the first point after the change.
        earliest: lower end of the interval of 95 % of `index`.
        latest: upper end.
        shift: relative change between the points before and after, up to the next changes.
        low: lower end of its interval of 95 %.
        high: upper end.
        p: probability of such a change in a series without any.
    """

    index: int
    earliest: int
    latest: int
    shift: float
    low: float
    high: float
    p: float


def change_points(values: Sequence[float], minimum: float) -> list[ChangePoint]:
    """The changes of a series.

    Args:
        values: positive numbers in the order of time.
        minimum: smallest relative change that matters.

    Returns:
        Changes in the order of time; none for a series shorter than SHORTEST, or one with a number
        that is not positive.
    """
    if len(values) < SHORTEST or min(values) <= 0:
        return []
    logs = [math.log(value) for value in values]
    splits = _segmented(logs, 0, len(logs))
    while True:
        edges = [0, *splits, len(logs)]
        parts = [(left, right) for left, right in zip(edges, edges[2:], strict=False)]
        found = [
            _described(logs, left, split, right)
            for (left, right), split in zip(parts, splits, strict=True)
        ]
        # A split may have been caused by points that another one has separated since.
        weak = [
            point for point in found if point.p > _LEVEL or abs(math.log1p(point.shift)) < minimum
        ]
        if not weak:
            return found
        splits.remove(max(weak, key=lambda point: point.p).index)


def _segmented(logs: Sequence[float], left: int, right: int) -> list[int]:
    """Splits between two points, found one by one, sorted."""
    if right - left < 2 * _SIDE:
        return []
    at, size = _strongest(logs[left:right])
    if _p_value(size, right - left) > _LEVEL:
        return []
    split = left + at
    return [*_segmented(logs, left, split), split, *_segmented(logs, split, right)]


def _described(logs: Sequence[float], left: int, split: int, right: int) -> ChangePoint:
    """A change between its neighbours."""
    part = logs[left:right]
    _, size = _strongest(part)
    shift, low, high = hodges_lehmann(logs[left:split], logs[split:right])
    likely = _likely_splits(_ranks(part))
    return ChangePoint(
        index=split,
        earliest=min(left + likely[0], split),
        latest=max(left + likely[-1], split),
        shift=math.expm1(shift),
        low=math.expm1(low),
        high=math.expm1(high) if math.isfinite(high) else math.inf,
        p=_p_value(size, len(part)),
    )


def _strongest(values: Sequence[float]) -> tuple[int, float]:
    """The split with the largest standardized rank-sum, and that."""
    return max(_rank_statistics(_ranks(values)), key=lambda item: item[1])


def _rank_statistics(ranks: Sequence[float]) -> list[tuple[int, float]]:
    count = len(ranks)
    sums = list(accumulate(ranks))
    return [
        (
            k,
            abs(sums[k - 1] - k * (count + 1) / 2) / math.sqrt(k * (count - k) * (count + 1) / 12),
        )
        for k in range(_SIDE, count - _SIDE + 1)
    ]


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values have their mean rank."""
    ordered = sorted(values)
    first = {value: rank for rank, value in reversed(list(enumerate(ordered, start=1)))}
    last = {value: rank for rank, value in enumerate(ordered, start=1)}
    return [(first[value] + last[value]) / 2 for value in values]


def _p_value(size: float, count: int) -> float:
    """The probability of such a statistic in a series of this length without a change."""
    if size <= 1:
        return 1.0
    density = statistics.NormalDist().pdf(size)
    splits = 2 * math.log((count - _SIDE) / _SIDE)
    return min(1.0, 4 * density / size + density * (size - 1 / size) * splits)


def _likely_splits(ranks: Sequence[float]) -> list[int]:
    """The splits that a likelihood ratio does not reject."""
    count = len(ranks)
    mean = (count + 1) / 2
    centred = [rank - mean for rank in ranks]
    total = math.fsum(value * value for value in centred)
    sums = list(accumulate(centred))
    rest = {
        k: max(total - sums[k - 1] ** 2 * count / (k * (count - k)), total * 1e-12)
        for k in range(_SIDE, count - _SIDE + 1)
    }
    least = min(rest.values())
    if least == 0:
        return list(rest)
    return [k for k, value in rest.items() if count * math.log(value / least) <= _RATIO]
