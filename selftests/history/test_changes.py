# SPDX-License-Identifier: GPL-2.0-or-later
"""Change points in series with planted changes, and without."""

from __future__ import annotations

import random
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paprscm.history import changes
from paprscm.history.changes import SHORTEST, change_points

MINIMUM = 0.03


def series(seed: int, *parts: tuple[int, float], noise: float = 0.05) -> list[float]:
    """Lognormal values around each part's level; one of 20 is 70 % larger."""
    generator = random.Random(seed)  # noqa: S311
    return [
        level * generator.lognormvariate(0, noise) * (1.7 if generator.random() < 0.05 else 1)
        for count, level in parts
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [14, 20, 40, 200])
def test_nothing_is_found_without_a_change(count: int) -> None:
    found = [bool(change_points(series(seed, (count, 3.0)), MINIMUM)) for seed in range(100)]
    assert sum(found) <= 2


@pytest.mark.parametrize(("count", "least"), [(7, 0.4), (10, 0.5), (20, 0.9), (100, 0.93)])
def test_a_change_of_20_percent_is_found(count: int, least: float) -> None:
    results = [change_points(series(s, (count, 1.0), (count, 1.2)), MINIMUM) for s in range(100)]
    hits = [found[0] for found in results if len(found) == 1]
    assert len(hits) >= least * len(results)
    near = [one.earliest <= count <= one.latest for one in hits]
    assert sum(near) >= 0.88 * len(hits)
    covered = [one.low <= 0.2 <= one.high for one in hits]
    # Of the changes that were found, which are too large in short series.
    assert sum(covered) >= 0.85 * len(hits)
    assert all(one.earliest <= one.index <= one.latest for one in hits)


def test_several_changes() -> None:
    values = series(4, (30, 1.0), (30, 1.4), (40, 1.1))
    first, second = change_points(values, MINIMUM)
    assert abs(first.index - 30) <= 1
    assert abs(second.index - 60) <= 1
    assert first.shift == pytest.approx(0.4, abs=0.08)
    assert second.shift == pytest.approx(1.1 / 1.4 - 1, abs=0.06)


def test_a_change_below_the_minimum_is_not_reported() -> None:
    values = series(1, (60, 1.0), (60, 1.02), noise=0.002)
    assert change_points(values, 0.03) == []
    assert [one.index for one in change_points(values, 0.01)] == [60]


def test_the_shortest_series() -> None:
    half = SHORTEST // 2
    found = change_points([1 + i / 100 for i in range(half)] + [2.0] * (SHORTEST - half), MINIMUM)
    assert [one.index for one in found] == [half]
    assert change_points([1.0] * (half - 1) + [2.0] * half, MINIMUM) == []


def test_series_without_logarithms_or_variance() -> None:
    assert change_points([1.0] * 50, MINIMUM) == []
    assert change_points([0.0] * 25 + [1.0] * 25, MINIMUM) == []
    (step,) = change_points([1.0] * 25 + [1.5] * 25, MINIMUM)
    assert (step.earliest, step.index, step.latest) == (25, 25, 25)
    assert (step.low, step.shift, step.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_p_value_is_that_of_all_orders() -> None:
    """The approximation is not below the exact value at the level, and not far above it."""
    sizes = sorted(
        changes._strongest(order)[1] for order in permutations(range(9)) if order[0] < order[1]
    )
    count = len(sizes)
    exact = sizes[int(count * 0.9)]
    assert 0.1 <= changes._p_value(exact, 9) <= 0.3


@given(st.lists(st.floats(0.01, 100), min_size=SHORTEST, max_size=60))
def test_any_series(values: list[float]) -> None:
    found = change_points(values, MINIMUM)
    assert [one.index for one in found] == sorted({one.index for one in found})
    for one in found:
        assert 4 <= one.index <= len(values) - 4
        assert one.earliest <= one.index <= one.latest
        assert one.low <= one.shift <= one.high
        assert abs(one.shift) >= 0.029
