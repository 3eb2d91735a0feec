# SPDX-License-Identifier: GPL-2.0-or-later
"""Comparison of two sets of run medians, for many metrics at once.

A run is the unit of observation: its repetitions share the run's noise, so pooling them finds
differences between equal sets. The null hypothesis is that a metric has moved by at most its
minimum effect. The p-value is that of a permutation test, whose null distribution is pooled over
the metrics (V. Tusher, R. Tibshirani, G. Chu, PNAS 98:5116, 2001): a metric alone cannot get below
2 / 924 with 6 + 6 runs, which a correction for 100 metrics would never accept.
"""

from __future__ import annotations

import math
import random
import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

LEVEL: Final = 0.05
"""False discovery rate, and 1 - confidence of intervals."""
POWER: Final = 0.8
_RELABELLINGS: Final = 4000
"""Number of relabellings up to which all of them are used: 7 + 7 runs have 3432."""
_EXACT_RUNS: Final = 30
"""Number of runs up to which the interval is exact; then it is that of a normal approximation."""
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A metric's run medians in two sets of runs; logarithms, for relative effects.

    Attributes:
        a: of the first set.
        b: of the second set.
        minimum: smallest difference that matters.
    """

    a: Sequence[float]
    b: Sequence[float]
    minimum: float


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The result for one metric, in the units of its sample.

    Attributes:
        shift: Hodges-Lehmann estimate of b - a.
        low: lower end of its interval; -inf for sets that are too small.
        high: upper end.
        p: probability of such a difference between sets that differ by the minimum only.
        q: p with the correction for the number of metrics.
        detectable: smallest shift that would have been found with a probability of POWER; inf if
            the sets are too small for any.
    """

    shift: float
    low: float
    high: float
    p: float
    q: float
    detectable: float

    @property
    def is_significant(self) -> bool:
        """The metric has moved by more than its minimum effect."""
        return self.q <= LEVEL


def enough(a: int, b: int) -> bool:
    """A permutation test of sets of these sizes can reach LEVEL: 4 + 4, 3 + 5, 2 + 8."""
    return 2 / math.comb(a + b, a) <= LEVEL


def judge(samples: Sequence[Sample]) -> list[Judgement]:
    """Compare the sets of each metric.

    Args:
        samples: each of them large enough().
    """
    towards = [_towards_a(sample) for sample in samples]
    # Statistics are comparable between sets of equal sizes only.
    sizes = [(len(sample.a), len(sample.b)) for sample in samples]
    nulls = {}
    for size in set(sizes):
        equal = [v for v, own in zip(towards, sizes, strict=True) if own == size]
        nulls[size] = _null_distribution(equal, size[0])
    p_values = []
    for sample, values, size in zip(samples, towards, sizes, strict=True):
        moved = abs(_difference(sample.a, sample.b)) > sample.minimum
        p_values.append(_p_value(_separation(values, size[0]), nulls[size]) if moved else 1.0)
    q_values = benjamini_hochberg(p_values)
    count = sum(q <= LEVEL for q in q_values)
    # The p-value that one more metric would have needed.
    needed = LEVEL * min(count + 1, len(samples)) / max(1, len(samples))
    judgements = []
    for sample, p, q, size in zip(samples, p_values, q_values, sizes, strict=True):
        shift, low, high = hodges_lehmann(sample.a, sample.b)
        detectable = sample.minimum + _detectable(sample, nulls[size], needed)
        judgements.append(
            Judgement(shift=shift, low=low, high=high, p=p, q=q, detectable=detectable)
        )
    return judgements


def hodges_lehmann(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The median of all differences b - a, and its interval of the confidence 1 - LEVEL.

    The interval inverts the rank-sum test (M. Hollander, D. Wolfe, Nonparametric Statistical
    Methods, 4.3).

    Returns:
        Estimate, lower and upper end; infinite ends for sets that are too small.
    """
    differences = sorted(y - x for x in a for y in b)
    estimate = statistics.median(differences)
    rank = _interval_rank(len(a), len(b))
    if rank == 0:
        return estimate, -math.inf, math.inf
    return estimate, differences[rank - 1], differences[-rank]


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """The p-values with the correction that controls the false discovery rate."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i], reverse=True)
    q_values, smallest = [1.0] * len(p_values), 1.0
    for worse, i in enumerate(order):
        smallest = min(smallest, p_values[i] * (len(p_values) / (len(p_values) - worse)))
        q_values[i] = smallest
    return q_values


def wilson(count: int, total: int) -> tuple[float, float]:
    """The interval of a rate, of the confidence 1 - LEVEL (E. B. Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    z, rate = statistics.NormalDist().inv_cdf(1 - LEVEL / 2), count / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total)
    half *= math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def fisher(a: int, a_total: int, b: int, b_total: int) -> float:
    """The two-sided p-value of Fisher's exact test of two rates."""
    both, total = a + b, a_total + b_total
    ways = [
        math.comb(a_total, k) * math.comb(b_total, both - k)
        for k in range(max(0, both - b_total), min(a_total, both) + 1)
    ]
    own = math.comb(a_total, a) * math.comb(b_total, b)
    return sum(way for way in ways if way <= own) / math.comb(total, both)


def _difference(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.fmean(b) - statistics.fmean(a)


def _towards_a(sample: Sample) -> list[float]:
    """The values of both sets; a second one that has moved is moved back by the minimum."""
    difference = _difference(sample.a, sample.b)
    step = math.copysign(sample.minimum, difference) if abs(difference) > sample.minimum else 0.0
    return [*sample.a, *(value - step for value in sample.b)]


def _separation(values: Sequence[float], first: int) -> float:
    """The part of the variance that is between the sets; it grows with the t statistic."""
    return _separations(values, first, lambda centred: [sum(centred[:first])])[0]


def _separations(
    values: Sequence[float],
    first: int,
    sums: Callable[[Sequence[float]], Sequence[float]],
) -> list[float]:
    """The separations under the relabellings whose sums of the first set `sums` returns."""
    mean = statistics.fmean(values)
    centred = [value - mean for value in values]
    total = math.fsum(value * value for value in centred)
    # Equal values, but for rounding.
    if total <= (_ROUNDING * max(map(abs, values))) ** 2 * len(values):
        return [0.0 for _ in sums(centred)]
    scale = (1 / first + 1 / (len(values) - first)) / total
    return [own * own * scale for own in sums(centred)]


def _null_distribution(metrics: Sequence[Sequence[float]], first: int) -> list[float]:
    """The separations of all metrics under all relabellings of the runs, sorted."""
    size = len(metrics[0])
    if math.comb(size, first) <= _RELABELLINGS:

        def sums(centred: Sequence[float]) -> Sequence[float]:
            if 2 * first == size:
                # Sets of equal size can be exchanged: one of the two has the first value.
                return [centred[0] + one for one in _sums_of_subsets(centred[1:], first - 1)]
            return _sums_of_subsets(centred, first)
    else:
        generator = random.Random(0)  # noqa: S311
        relabellings: list[Sequence[int]] = [range(first)]
        relabellings += [generator.sample(range(size), first) for _ in range(_RELABELLINGS)]

        def sums(centred: Sequence[float]) -> Sequence[float]:
            return [sum(map(centred.__getitem__, chosen)) for chosen in relabellings]

    null: list[float] = []
    for values in metrics:
        null += _separations(values, first, sums)
    null.sort()
    return null


def _sums_of_subsets(values: Sequence[float], size: int) -> list[float]:
    """The sums of all subsets of this size, in no particular order.

    Each subset is one that has the last value or one that has not, so a sum is one addition.
    """
    found: list[list[float]] = [[0.0], *([] for _ in range(size))]
    for value in values:
        for own in range(size, 0, -1):
            found[own] += [one + value for one in found[own - 1]]
    return found[size]


def _p_value(separation: float, null: Sequence[float]) -> float:
    return (len(null) - bisect_left(null, separation - _ROUNDING)) / len(null)


def _detectable(sample: Sample, null: Sequence[float], needed: float) -> float:
    """The difference, beyond the minimum, that would have been found with a probability of POWER.

    By the normal approximation of the noncentral t distribution.
    """
    freedom = len(sample.a) + len(sample.b) - 2
    at = math.ceil(len(null) * (1 - needed))
    if at >= len(null):
        return math.inf
    critical = null[at]
    if critical >= 1 - _ROUNDING:
        return math.inf
    t = math.sqrt(critical / (1 - critical) * freedom)
    z = statistics.NormalDist().inv_cdf(POWER)
    t += z + (z**3 + z) / (4 * freedom)
    variance = sum(_squares(part) for part in (sample.a, sample.b)) / freedom
    return t * math.sqrt(variance * (1 / len(sample.a) + 1 / len(sample.b)))


def _squares(values: Sequence[float]) -> float:
    mean = statistics.fmean(values)
    return math.fsum((value - mean) ** 2 for value in values)


def _interval_rank(a: int, b: int) -> int:
    """Rank, from both ends, of the differences that bound the interval; 0 without one."""
    if a + b > _EXACT_RUNS:
        deviation = math.sqrt(a * b * (a + b + 1) / 12)
        return max(0, int(a * b / 2 - statistics.NormalDist().inv_cdf(1 - LEVEL / 2) * deviation))
    tail = LEVEL / 2 * math.comb(a + b, a)
    return sum(1 for count in accumulate(_rank_sums(a, b)) if count <= tail)


def _rank_sums(a: int, b: int) -> list[int]:
    """Number of orders of a + b values for each value of the Mann-Whitney statistic."""
    # The coefficients of the Gaussian binomial (a + b, a).
    counts = [1] + [0] * (a * b)
    for i in range(1, a + 1):
        for k in range(a * b, b + i - 1, -1):
            counts[k] -= counts[k - b - i]
        for k in range(i, a * b + 1):
            counts[k] += counts[k - i]
    return counts
