# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm bench suite`: the times of a job have its duration as their sum."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from records import START, make_test
from rich.console import Console

from paprscm.commands import suite_time
from paprscm.commands.series import Series, append_series, read_series
from paprscm.commands.suite_time import JobTime
from paprscm.results.record import Test, Times
from paprscm.timesheet import ACTIVITIES


def finished(
    name: str,
    elapsed_s: float,
    *,
    cpu_s: float = 0.0,
    count: int = 1,
    began_s: float = 10.0,
    **seconds: float,
) -> Test:
    """A test in the record of a job."""
    counts: dict[str, int] = {activity: count * (activity in seconds) for activity in ACTIVITIES}
    times = Times(
        start=START,
        began_s=began_s,
        duration_s=elapsed_s,
        activities=seconds,
        counts=counts,
        cpu_s=cpu_s,
    )
    return make_test(name, id=name, times=times)


def killed(name: str, elapsed_s: float) -> Test:
    """A test whose process was killed."""
    return make_test(name, "ERROR", elapsed_s, id=name)


TESTS = [
    finished("1-a", 10.0, cpu_s=3.0, starts=2.0, commands=5.0, rest=2.0),
    finished("2-b", 20.0, cpu_s=4.0, count=3, starts=1.0, tools=18.0, rest=0.5),
    killed("3-c", 4.0),
    make_test("4-d", "INTERRUPTED", times=None),
]


def series(*jobs: JobTime, mode: str = "parallel", **environment: str) -> Series:
    """A series with these jobs of one mode."""
    found = {
        "modes": {mode: "warm"},
        "counts": {mode: [job.counts for job in jobs]},
        "unrecorded": {mode: [job.unrecorded for job in jobs]},
    }
    values = suite_time.time_values(mode, jobs)
    return Series({"tests": "tests/", **environment}, 1e9, "s", values, found)


def rows(series: Series, before: Series | None = None, *, width: int = 80) -> dict[str, list[str]]:
    """Cells of the table on a terminal, by the words of the first column."""
    console = Console(width=width, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(suite_time.time_table(series, before))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    cells = [[cell for cell in line.split("  ") if cell.strip()] for line in lines]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells if row}


def test_the_sum_is_the_time_of_the_slots() -> None:
    job = suite_time.account(TESTS, 10.0, 35.0, 2)
    spent = {name: seconds for name, seconds in job.seconds.items() if seconds}
    assert spent == {
        **{"starts": 3.0, "tools": 18.0, "commands": 5.0, "rest": 2.5},
        **{"Avocado": 1.5, "no record": 4.0, "idle": 6.0, "job end": 10.0},
    }
    assert sum(job.seconds.values()) == 25.0 * 2
    assert {name: count for name, count in job.counts.items() if count} == {
        **{"starts": 4, "tools": 3, "commands": 1},
    }
    assert job.cpu_s == 7.0
    assert job.unrecorded == ("3-c",)


def test_the_start_and_the_end_of_a_job_are_apart() -> None:
    tests = [finished("1-a", 10.0, began_s=103.0), finished("2-b", 20.0, began_s=101.0)]
    spent = suite_time.account([*tests, TESTS[3]], 100.0, 125.0, 2).seconds
    # One slot is free from 101 to 103 and from 113 to 121.
    assert (spent["job start"], spent["job end"], spent["idle"]) == (2.0, 8.0, 10.0)
    assert sum(spent.values()) == 25.0 * 2


def test_a_killed_test_is_named() -> None:
    job = suite_time.account([killed("1-x", 4.0)], 10.0, 15.0, 1)
    assert (job.seconds["no record"], job.seconds["job end"]) == (4.0, 1.0)
    table = rows(series(job))
    assert table["killed tests"] == ["4.0", "80"]
    assert table["no record of its time: 1-x"] == []


def test_the_table_has_seconds_share_and_number() -> None:
    job = suite_time.account(TESTS[:2], 10.0, 35.0, 2)
    table = rows(series(job, suite_time.account(TESTS[:2], 10.0, 45.0, 2)))
    # Medians of 50 s and 70 s: 60 s.
    assert table["starts"] == ["3.0", "5", "4"]
    assert table["guest tools"] == ["18.0", "30", "3"]
    assert table["after last test"] == ["20.0", "33"]
    assert table["idle between them"] == ["10.0", "17"]
    assert table["job x concurrent"] == ["60.0", "100"]
    assert table["CPU time of tests"] == ["7.0", "12"]
    assert "killed tests" not in table


def test_three_modes_fit_into_80_columns() -> None:
    long = finished("1-a", 9000.0, count=9000, **dict.fromkeys(ACTIVITIES, 1234.5))
    job = suite_time.account([long], 0.0, 9999.0, 1)
    one = series(job)
    values: dict[str, list[float]] = {}
    found: dict[str, Any] = {key: {} for key in one.found}
    for mode in ("cold", "warm", "parallel"):
        values |= suite_time.time_values(mode, [job])
        for key, content in one.found.items():
            found[key] = {**found[key], mode: content["parallel"]}
    all_modes = Series(one.environment, 1.0, "s", values, found)
    assert rows(all_modes, all_modes) == rows(all_modes, all_modes, width=200)


def test_the_last_comparable_series_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "series.jsonl"
    assert read_series(file) == []
    slow, fast, other = (
        series(
            suite_time.account([finished("1-a", spent_s, starts=spent_s)], 0.0, 9.0, 1), cpus=cpus
        )
        for spent_s, cpus in ((4.0, "2"), (1.0, "2"), (7.0, "8"))
    )
    for earlier in (slow, fast, other):
        append_series(earlier, file)
    before = suite_time.comparable(fast, read_series(file))
    assert before is not None
    assert before.values == fast.values
    assert suite_time.comparable(series(JobTime(), cpus="1"), read_series(file)) is None
    table = rows(slow, before)
    assert table["starts"] == ["4.0", "44", "1", "1.0"]
    assert next(note for note in table if note.startswith("before: parallel on 2001-09-"))


def test_a_series_of_before_this_measurement_has_no_times() -> None:
    old = Series({"tests": "tests/"}, 1e9, "s", {"parallel job": [9.0]}, {})
    job = suite_time.account(TESTS[:1], 0.0, 12.0, 1)
    assert rows(series(job), old)["starts"] == ["2.0", "17", "1"]
