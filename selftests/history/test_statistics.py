# SPDX-License-Identifier: GPL-2.0-or-later
"""The statistics of comparisons, on planted effects and on equal sets."""

from __future__ import annotations

import math
import random
import statistics
from itertools import combinations, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from paprscm.history.statistics import (
    LEVEL,
    POWER,
    Judgement,
    Sample,
    benjamini_hochberg,
    enough,
    fisher,
    hodges_lehmann,
    judge,
    wilson,
)

SLOWER = math.log(1.2)
MINIMUM = math.log(1.03)
VALUES = st.floats(-5, 5).map(lambda value: round(value, 3))
SETS = st.integers(4, 6).flatmap(
    lambda n: st.tuples(
        st.lists(VALUES, min_size=4, max_size=5, unique=True),
        st.lists(VALUES, min_size=n, max_size=n, unique=True),
    )
)


def run_medians(generator: random.Random, runs: int, noise: float, shift: float) -> list[float]:
    """Logarithms of medians of 200 repetitions with noise of 15 % within a run."""
    within = math.sqrt(math.pi / 2) * 0.15 / math.sqrt(200)
    return [shift + generator.gauss(0, math.hypot(noise, within)) for _ in range(runs)]


def compared(seed: int, runs: int, noise: float, metrics: int, slower: int) -> list[Judgement]:
    """Two sets of runs; the first metrics of the second set are 20 % slower."""
    generator = random.Random(seed)  # noqa: S311
    return judge(
        [
            Sample(
                a=run_medians(generator, runs, noise, 0),
                b=run_medians(generator, runs, noise, SLOWER if i < slower else 0),
                minimum=MINIMUM,
            )
            for i in range(metrics)
        ]
    )


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.08])
def test_nothing_is_found_in_24_comparisons_of_equal_sets(noise: float) -> None:
    found = [one for seed in range(24) for one in compared(seed, 6, noise, 30, 0)]
    assert len(found) == 720
    assert [one for one in found if one.is_significant] == []


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.08])
def test_the_smallest_sets_keep_the_level(noise: float) -> None:
    """One of 35 comparisons of 4 + 4 runs has the most extreme labels by chance."""
    results = [compared(seed, 4, noise, 30, 0) for seed in range(60)]
    alarms = sum(any(one.is_significant for one in found) for found in results)
    assert alarms <= LEVEL * len(results)


@pytest.mark.parametrize(("noise", "least"), [(0.02, 1.0), (0.05, 0.75), (0.08, 0.2)])
def test_a_slow_down_of_20_percent_is_found_with_6_and_6_runs(noise: float, least: float) -> None:
    """The FACTS of the noise: 100 % with one metric at 2 % and 5 %, 86 % at 8 %."""
    results = [compared(seed, 6, noise, 30, 6) for seed in range(10)]
    hits = [one.is_significant for found in results for one in found[:6]]
    others = [one.is_significant for found in results for one in found[6:]]
    assert sum(hits) / len(hits) >= least
    assert sum(others) <= LEVEL * sum(hits)
    assert all(one.low <= one.shift <= one.high for found in results for one in found)


def test_one_slow_metric_of_a_hundred_is_found() -> None:
    """Its own permutations alone could not: 100 x 2 / 924 > 0.05."""
    found = compared(1, 6, 0.02, 100, 1)
    assert [one.is_significant for one in found] == [True] + [False] * 99


def test_the_intervals_contain_the_shift() -> None:
    covered = [
        one.low <= SLOWER <= one.high
        for seed in range(20)
        for one in compared(seed, 6, 0.05, 20, 20)
    ]
    assert 0.92 <= sum(covered) / len(covered) <= 0.99


def test_a_detectable_shift_is_found_with_its_probability() -> None:
    hits = []
    for seed in range(25):
        generator = random.Random(seed)  # noqa: S311
        quiet = [
            Sample(
                a=run_medians(generator, 6, 0.05, 0),
                b=run_medians(generator, 6, 0.05, 0),
                minimum=MINIMUM,
            )
            for _ in range(20)
        ]
        # Of a typical metric, because that of one metric has the noise of its variance.
        typical = statistics.median(one.detectable for one in judge(quiet))
        planted = Sample(
            a=run_medians(generator, 6, 0.05, 0),
            b=run_medians(generator, 6, 0.05, typical),
            minimum=MINIMUM,
        )
        for number in range(4):
            own = run_medians(generator, 6, 0.05, typical)
            sample = Sample(a=run_medians(generator, 6, 0.05, 0), b=own, minimum=MINIMUM)
            hits.append(judge([sample if number else planted, *quiet[1:]])[0].is_significant)
    assert POWER - 0.15 <= sum(hits) / len(hits) <= POWER + 0.15


def test_a_shift_of_less_than_the_minimum_is_not_found() -> None:
    a = [0, 0.001, 0.002, 0.003, 0.004, 0.005]
    near = [value + MINIMUM - 0.001 for value in a]
    far = [value + 2 * MINIMUM for value in a]
    low, high = judge([Sample(a=a, b=b, minimum=MINIMUM) for b in (near, far)])
    assert (low.p, low.is_significant) == (1.0, False)
    assert high.is_significant


def test_the_p_value_of_one_metric_is_that_of_its_permutations() -> None:
    a, b = [1.0, 2.0, 3.0, 4.0], [11.0, 12.0, 13.0, 14.0]
    (one,) = judge([Sample(a=a, b=b, minimum=0)])
    assert one.p == pytest.approx(2 / 70)
    mixed = [2.5, 12.0, 13.0, 14.0]
    values = [*a, *mixed]
    sums = [sum(chosen) for chosen in combinations(values, 4)]
    distances = [abs(own - sum(values) / 2) for own in sums]
    extreme = sum(d >= distances[0] - 1e-9 for d in distances) / len(distances)
    assert judge([Sample(a=a, b=mixed, minimum=0)])[0].p == pytest.approx(extreme)


def test_many_runs_have_a_sample_of_the_permutations() -> None:
    generator = random.Random(3)  # noqa: S311
    a, b = run_medians(generator, 20, 0.05, 0), run_medians(generator, 20, 0.05, 0.06)
    (one,) = judge([Sample(a=a, b=b, minimum=0)])
    assert one.p < 0.02
    assert one.is_significant
    # The labels themselves are in the sample.
    (far,) = judge([Sample(a=a, b=[value + 9 for value in b], minimum=0)])
    assert far.p == pytest.approx(1 / 4001)


def test_equal_and_constant_metrics() -> None:
    constant = Sample(a=[0.1] * 4, b=[0.1] * 4, minimum=0.0)
    stepped = Sample(a=[3.0] * 4, b=[4.0] * 4, minimum=0.1)
    same, step = judge([constant, stepped])
    assert (same.p, same.shift, same.low, same.high) == (1.0, 0.0, 0.0, 0.0)
    assert (step.shift, step.is_significant) == (1.0, True)
    assert judge([]) == []


def test_sizes_that_can_reach_the_level() -> None:
    sizes = [(a, b) for a in range(1, 6) for b in range(a, 40) if enough(a, b)]
    smallest: dict[int, int] = {}
    for a, b in sizes:
        smallest.setdefault(a, b)
    assert smallest == {1: 39, 2: 8, 3: 5, 4: 4, 5: 5}


@given(SETS, st.floats(0, 1))
def test_the_sets_can_be_exchanged(sets: tuple[list[float], list[float]], minimum: float) -> None:
    a, b = sets
    (one,) = judge([Sample(a=a, b=b, minimum=minimum)])
    (two,) = judge([Sample(a=b, b=a, minimum=minimum)])
    assert two.shift == pytest.approx(-one.shift)
    assert (two.low, two.high) == pytest.approx((-one.high, -one.low))
    assert two.p == pytest.approx(one.p)
    assert 0 < one.p <= one.q <= 1


@given(SETS)
def test_the_interval_inverts_the_rank_sum_test(sets: tuple[list[float], list[float]]) -> None:
    """A shift within the interval is not rejected, one outside is."""
    a, b = sets
    differences = sorted(y - x for x in a for y in b)
    assume(all(y - x > 1e-6 for x, y in pairwise(differences)))
    _, low, high = hodges_lehmann(a, b)
    orders = list(combinations(range(len(a) + len(b)), len(a)))

    def p_value(shift: float) -> float:
        smaller = sum(y - shift < x for x in a for y in b)
        least = min(smaller, len(a) * len(b) - smaller)
        base = len(a) * (len(a) - 1) // 2
        return 2 * sum(sum(order) - base <= least for order in orders) / len(orders)

    assert p_value(low - 1e-7) <= LEVEL < p_value(low + 1e-7)
    assert p_value(high + 1e-7) <= LEVEL < p_value(high - 1e-7)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_benjamini_hochberg(p_values: list[float]) -> None:
    """It rejects up to the largest p-value that is below its line."""
    ordered, count = sorted(p_values), len(p_values)
    below = [p for rank, p in enumerate(ordered, start=1) if p <= LEVEL * rank / count]
    limit = max(below, default=-1.0)
    q_values = benjamini_hochberg(p_values)
    for p, q in zip(p_values, q_values, strict=True):
        # Not at the limit itself, which rounding decides.
        if abs(q - LEVEL) > 1e-12:
            assert (q <= LEVEL) == (p <= limit)
        assert q >= p


def test_known_values() -> None:
    # Fisher's tea, and a table of E. B. Wilson's interval.
    assert fisher(3, 4, 1, 4) == pytest.approx(0.4857, abs=1e-4)
    assert fisher(0, 6, 6, 6) == pytest.approx(2 / 924)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 0) == (0, 1)
    assert benjamini_hochberg([0.01, 0.02, 0.03, 0.5]) == pytest.approx([0.04, 0.04, 0.04, 0.5])
