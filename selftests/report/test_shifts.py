# SPDX-License-Identifier: GPL-2.0-or-later
"""Lasting changes of metrics in histories with planted changes, and without."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from records import BARE, GUEST, KERNEL, make_record, make_test

from paprscm.report.histories import histories
from paprscm.report.metrics import Series, series
from paprscm.report.runs import in_order
from paprscm.report.shifts import certain, groups, percent, shifts
from paprscm.results.record import Metric, Record

FIRST = datetime(2026, 10, 1, 3, tzinfo=UTC)
OLD, NEW = "6.12.115", "6.12.117"


def nightly(
    values: Sequence[Sequence[float]], *, at: int = -1, unit: str = "us", duration_s: float = 1.0
) -> list[Record]:
    """A job a night.

    Args:
        values: of each metric, a value a night.
        at: the first night with the new kernel; -1: all have the old one.
        unit: of the metrics.
        duration_s: of the only test.
    """
    records = []
    for night, own in enumerate(zip(*values, strict=True)):
        release = NEW if 0 <= at <= night else OLD
        metrics = tuple(Metric(name=f"m{i}", value=v, unit=unit) for i, v in enumerate(own))
        start = (FIRST + timedelta(days=night)).isoformat()
        test = make_test("x", duration_s=duration_s, metrics=metrics)
        record = make_record(test, id=f"{night:07x}", start=start, end=start)
        kernel = replace(KERNEL, release=release, build_id=release)
        guest = replace(GUEST, kernel=kernel)
        records.append(replace(record, environments={"guest": guest, "bare": BARE}))
    return records


def noisy(seed: int, *parts: tuple[int, float], noise: float = 0.04) -> list[float]:
    chance = random.Random(seed)  # noqa: S311
    return [level * chance.lognormvariate(0, noise) for n, level in parts for _ in range(n)]


def measured(records: Sequence[Record]) -> list[Series]:
    """The series of all tests, without durations."""
    found = [one for history in histories(in_order(records)) for one in series(history)]
    return [one for one in found if not one.is_duration]


# --- one series


def test_a_slow_down_of_20_percent_with_a_new_kernel() -> None:
    (one,) = measured(nightly([noisy(3, (20, 40), (15, 48))], at=20))
    (shift,) = shifts([one])
    assert shift.change == "worse"
    assert shift.low < 0.2 < shift.high and shift.size == pytest.approx(0.2, abs=0.04)
    assert shift.earliest.number <= 20 <= shift.latest.number
    assert "Linux 6.12.115 → 6.12.117" in (*shift.changed, *shift.changed_near)
    assert one.band is not None and one.band.low > 41
    assert [(level.start, level.stop) for level in one.levels] == [
        (0, shift.first.number),
        (shift.first.number, 35),
    ]


@pytest.mark.parametrize(("unit", "change"), [("1/s", "better"), ("us", "worse"), ("1", "changed")])
def test_the_meaning_of_a_change(unit: str, change: str) -> None:
    (shift,) = shifts(measured(nightly([noisy(3, (20, 40), (15, 60))], unit=unit)))
    assert shift.change == change


def test_a_series_without_a_change_has_none() -> None:
    quiet = measured(nightly([noisy(seed, (40, 40)) for seed in range(60)]))
    assert len(quiet) == 60 and all(one.can_change for one in quiet)
    assert len(shifts(quiet)) <= 1
    assert certain(quiet, shifts(quiet)) == []
    for one in (one for one in quiet if not one.changes):
        assert len(one.levels) == 1


def test_few_runs_have_no_change() -> None:
    assert shifts(measured(nightly([[1.0] * 6 + [2.0] * 6]))) == []
    assert len(shifts(measured(nightly([[1.0, 1.1] * 4 + [2.0, 2.1] * 4])))) == 1


def test_a_duration_has_to_change_by_10_percent() -> None:
    def durations(factor: float) -> list[Record]:
        quick, slow = ([[1.0] * 15] for _ in range(2))
        late = nightly(slow, duration_s=factor)
        late = [
            replace(
                r, job=replace(r.job, id=f"b{r.job.id}", start=r.job.start.replace("-10-", "-11-"))
            )
            for r in late
        ]
        return [*nightly(quick), *late]

    def found(factor: float) -> int:
        (history,) = histories(in_order(durations(factor)))
        return len(shifts(one for one in series(history) if one.is_duration))

    assert (found(1.08), found(1.15)) == (0, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameters": {"cycles": "9"}}, "parameters none → cycles=9"),
        ({"host": "6.19"}, "kernel of the host 6.18 → 6.19"),
        ({"suite": "e" * 40}, "suite 0.1.0 (ffffffffffff) → 0.1.0 (eeeeeeeeeeee)"),
        ({}, None),
    ],
)
def test_conditions_that_changed_as_well(change: dict[str, Any], words: str | None) -> None:
    records = nightly([[1.0] * 10 + [2.0] * 10])
    for night in range(10, 20):
        record = records[night]
        job = replace(record.job, parameters=change.get("parameters", {}))
        host = replace(record.host, kernel=change.get("host", record.host.kernel))
        suite = replace(record.suite, commit=change.get("suite", record.suite.commit))
        records[night] = replace(record, job=job, host=host, suite=suite)
    (shift,) = shifts(measured(records))
    assert shift.changed == ((words,) if words else ())


def test_numbers_whose_ratio_overflows() -> None:
    assert shifts(measured(nightly([[1e-300] * 10 + [1e299] * 10]))) == []
    assert shifts(measured(nightly([[-1.0] * 10 + [1.0] * 10]))) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.198, "+19.8 %"),
        (-0.05, "\N{MINUS SIGN}5.0 %"),
        (2.5, "+250 %"),
        (float("inf"), "unknown"),
    ],
)
def test_percentages(value: float, text: str) -> None:
    assert percent(value) == text


# --- all series of a site


def test_changes_of_one_run_are_one_group() -> None:
    """Their estimates differ by a few runs; the run that most intervals contain is theirs."""
    planted = [noisy(seed, (20, 40), (15, 48), noise=0.06) for seed in range(30)]
    quiet = [noisy(seed, (35, 40), noise=0.06) for seed in range(100, 130)]
    found = measured(nightly([*planted, *quiet], at=20))
    firsts = {shift.first.number for shift in shifts(found)}
    assert min(firsts) < 20 < max(firsts)
    group, *others = certain(found, shifts(found))
    assert group.lead.first.number == 20 and len(group.shifts) >= 25
    assert "Linux 6.12.115 → 6.12.117" in group.lead.changed
    assert others == []
    assert group.counts_after(3) == f"{len(group.shifts) - 3} worse"


def test_changes_at_different_times_are_different_groups() -> None:
    early, late = ([1.0] * n + [2.0] * (40 - n) for n in (15, 25))
    found = groups(shifts(measured(nightly([early, late, early]))))
    assert [(g.lead.first.number, len(g.shifts)) for g in found] == [(25, 1), (15, 2)]


def test_other_changes_do_not_make_a_single_one_certain() -> None:
    """Among 200 changes of one run, the correction for all series alone would accept it."""
    step = noisy(3, (20, 40), (15, 60))
    doubtful = next(
        values
        for seed in range(1000)
        if (own := shifts(measured(nightly([values := noisy(seed, (9, 40), (26, 42))]))))
        and 0.001 < own[0].p < 0.01
        and own[0].latest.number < 18
    )
    quiet = [noisy(seed, (35, 40)) for seed in range(40)]
    found = measured(nightly([*([step] * 40), doubtful, *quiet]))
    assert any(one.changes and one.changes[0].index < 18 for one in found)
    (group,) = certain(found, shifts(found))
    assert len(group.shifts) == 40
