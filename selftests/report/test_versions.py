# SPDX-License-Identifier: GPL-2.0-or-later
"""Comparison of the newest version with the one before, in each environment."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from records import BARE, GUEST, KERNEL, make_record, make_test

from paprscm.report.runs import in_order
from paprscm.report.versions import RUNS, Versions, versions
from paprscm.results.record import Metric, Record


def nights(*parts: tuple[int, str, float], metrics: int = 20, **changes: Any) -> list[Record]:
    """Runs on consecutive days.

    Args:
        parts: number of runs, build of the kernel, and factor of all times.
        metrics: number of metrics.
        changes: of the job.
    """
    chance = random.Random(5)  # noqa: S311
    records: list[Record] = []
    for count, build, factor in parts:
        for _ in range(count):
            day = len(records)
            own = tuple(
                Metric(name=f"m{i}", value=factor * chance.lognormvariate(0, 0.03), unit="s")
                for i in range(metrics)
            )
            start = f"2026-{1 + day // 28:02}-{1 + day % 28:02}T03:00:00+00:00"
            job = {"id": f"{day:08x}", "start": start, "end": start} | changes
            guest = replace(GUEST, kernel=replace(KERNEL, build_id=build))
            record = make_record(make_test("x", metrics=own), **job)
            records.append(replace(record, environments={"guest": guest, "bare": BARE}))
    return records


def compared(records: list[Record]) -> list[Versions]:
    return versions(in_order(records))


def sizes(found: list[Versions]) -> list[tuple[int, int, bool]]:
    return [(len(one.a), len(one.b), one.found is not None) for one in found]


def test_a_slow_down_of_20_percent() -> None:
    (one,) = compared(nights((8, "old", 1), (7, "new", 1.2)))
    assert one.found is not None
    changed = [result for result in one.found.metrics if result.change]
    assert len(changed) == 20 and {result.change for result in changed} == {"worse"}
    assert all((r.low or 0) < r.shift < (r.high or 0) for r in changed)
    assert all((r.low or 0) < 0.2 < (r.high or 0) for r in changed[5:15])
    assert one.differences["kernel"] == ("6.12.117-paprscm old", "6.12.117-paprscm new")
    assert one.title == "Linux 6.12.117 was built again"
    assert one.command == (
        "paprscm compare 00000002 00000003 00000004 00000005 00000006 00000007"
        " -- 00000009 0000000a 0000000b 0000000c 0000000d 0000000e"
    )


def test_equal_versions_have_no_change() -> None:
    (one,) = compared(nights((8, "old", 1), (7, "new", 1)))
    assert one.found is not None and len(one.found.metrics) == 20
    assert [result for result in one.found.metrics if result.change] == []
    assert one.found.detectable is not None


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (20, 20, (RUNS // 2, RUNS // 2, True)),
        (20, 2, (RUNS - 2, 2, True)),
        (3, 20, (3, RUNS - 3, True)),
        (4, 4, (4, 4, True)),
        (3, 4, (3, 4, False)),
        (20, 1, (RUNS - 1, 1, False)),
    ],
)
def test_sizes_of_sets(a: int, b: int, expected: tuple[int, int, bool]) -> None:
    found = compared(nights((a, "old", 1), (b, "new", 1)))
    assert sizes(found)[:1] == [expected]
    # The newest runs of each.
    assert found[0].b[-1].number == a + b - 1 and found[0].a[-1].number == a - 1
    if not expected[2]:
        assert found[0].obstacles[0].startswith(f"noise unknown: {expected[0]} against {b} runs")


def test_a_new_version_with_one_run_leaves_the_comparison_before_it() -> None:
    found = compared(nights((6, "1", 1), (6, "2", 1.2), (1, "3", 1)))
    assert sizes(found) == [(6, 1, False), (6, 6, True)]
    assert found[1].differences["kernel"] == ("6.12.117-paprscm 1", "6.12.117-paprscm 2")


def test_alternating_runs() -> None:
    parts = [(1, "old", 1.0), (1, "new", 1.0)] * 6
    assert [one.is_alternating for one in compared(nights(*parts))] == [True]
    assert [one.is_alternating for one in compared(nights((6, "o", 1), (6, "n", 1)))] == [False]


def test_runs_with_other_parameters_are_another_set() -> None:
    records = nights((6, "old", 1), (6, "new", 1.2))
    records[6:] = [replace(r, job=replace(r.job, parameters={"cycles": "9"})) for r in records[6:]]
    assert compared(records) == []


def test_another_host_is_another_place() -> None:
    records = nights((6, "old", 1), (6, "new", 1.2))
    records[6:] = [replace(r, host=replace(r.host, cpu="Xeon")) for r in records[6:]]
    assert compared(records) == []


def test_another_commit_of_the_suite_is_a_warning() -> None:
    records = nights((6, "old", 1), (6, "new", 1.2))
    records[3:] = [replace(r, suite=replace(r.suite, commit="e" * 40)) for r in records[3:]]
    (one,) = compared(records)
    assert one.found is not None
    assert any("differ in the commit of the suite" in text for text in one.found.warnings)


def test_one_version_is_not_compared() -> None:
    assert compared(nights((20, "old", 1))) == []


def test_two_references_are_an_obstacle() -> None:
    records = nights((6, "old", 1), (6, "new", 1.2))
    reference = (Metric(name="reference", value=1.0, unit="s"),)
    both = [make_test(name, metrics=reference) for name in ("y", "z")]
    (one,) = compared([replace(r, tests=(*r.tests, *both)) for r in records])
    assert one.found is None and "is not one metric" in one.obstacles[0]


@pytest.mark.parametrize("values", [(1e299, -1e299), (1e-300, 1e99), (1e299, 1e299)])
def test_numbers_that_overflow(values: tuple[float, float]) -> None:
    records = nights((6, "old", 1), (6, "new", 1))
    for number, record in enumerate(records):
        own = (Metric(name="huge", value=values[number >= 6] * (1 + number / 100), unit="s"),)
        test = replace(record.tests[0], metrics=(*record.tests[0].metrics, *own))
        records[number] = replace(record, tests=(test,))
    (one,) = compared(records)
    assert one.found is not None and len(one.found.metrics) in (20, 21)


def test_an_id_is_harmless_in_a_shell() -> None:
    records = nights((6, "old", 1), (6, "new", 1))
    records = [replace(r, job=replace(r.job, id=f"$(;{r.job.id[-2:]}`")) for r in records]
    (one,) = compared(records)
    assert not set("$(;`") & set(one.command)
