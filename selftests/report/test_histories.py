# SPDX-License-Identifier: GPL-2.0-or-later
"""Order of runs, tracks, breakages, known issues and noise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from records import BARE, GUEST, KERNEL, QEMU, finding, make_record, make_test

from paprscm.report.histories import Breakage, History, histories, issues
from paprscm.report.metrics import RUNS_FOR_NOISE, Series, number, series
from paprscm.report.runs import Run, branch, changes, in_order, page_key
from paprscm.results.record import Environment, Metric, Record, Test


def job(day: int, *tests: Test, release: str = "6.12.115-paprscm", **changes: Any) -> Record:
    """A job on a day of November with a kernel."""
    start = f"2026-11-{day:02}T03:00:00.000+00:00"
    record = make_record(
        *tests,
        **{"id": f"{day:07x}", "start": start, "end": start[:11] + "03:05:00+00:00"} | changes,
    )
    guest = replace(GUEST, kernel=replace(KERNEL, release=release, build_id=release))
    return replace(record, environments={"guest": guest, "bare": BARE})


def verdicts(letters: str, release: str = "6.12.115-paprscm") -> list[Record]:
    """Jobs on consecutive days with the statuses of one test; "-" is a job without it."""
    statuses = {"p": "PASS", "f": "FAIL", "w": "WARN", "c": "CANCEL", "i": "INTERRUPTED"}
    return [
        job(day, *([make_test("x", statuses[letter])] if letter != "-" else []), release=release)
        for day, letter in enumerate(letters, 1)
    ]


def only(records: Sequence[Record]) -> History:
    """The history of the only test."""
    (history,) = histories(in_order(records))
    return history


def breakage(letters: str) -> Breakage | None:
    found = only(verdicts(letters)).breakages()
    return found[0] if found else None


def days(runs: Sequence[Run]) -> list[str]:
    return [run.time[8:10] for run in runs]


# --- runs


def test_runs_are_in_chronological_order_across_zones() -> None:
    records = [
        job(1, start="2026-11-02T01:30:00+02:00"),
        job(2, start="2026-11-02T00:00:00+00:00"),
        job(3, start="2026-11-01T23:00:00-02:00"),
        job(4, start="2026-11-01T22:00:00"),
    ]
    random.Random(1).shuffle(records)  # noqa: S311
    assert [run.time for run in in_order(records)] == [
        *("2026-11-01 22:00", "2026-11-01 23:30", "2026-11-02 00:00", "2026-11-02 01:00"),
    ]


def test_a_job_that_is_given_twice_is_one_run() -> None:
    first, second = job(1, make_test("x", "FAIL")), job(1, make_test("x"))
    (run,) = in_order([first, second])
    assert run.tests["flush/test_x.py:X.x"].status == "PASS"


def test_clocks_that_jump() -> None:
    back = job(1, end="2026-11-01T02:00:00+00:00")
    unreadable = job(2, start="yesterday")
    killed = job(3, end=None)
    runs = in_order([killed, back, unreadable])
    assert [(run.time, run.duration_s) for run in runs] == [
        *(("unknown time", None), ("2026-11-01 03:00", None), ("2026-11-03 03:00", None)),
    ]


def test_a_test_that_ran_twice_in_a_job_has_its_worst_result() -> None:
    (run,) = in_order([job(1, make_test("x"), make_test("x", "FAIL"), make_test("x"))])
    assert [test.status for test in run.tests.values()] == ["FAIL"]


def test_pages_of_different_tests_have_different_names() -> None:
    names = ["a/b.py:C.d", "a/b.py:C.d;run-1", "a b.py C d", "A/b.py:C.d", "<", ">", "", "x" * 500]
    keys = {page_key(name, name) for name in names}
    assert len({key.lower() for key in keys}) == len(names)
    assert all(len(key) < 100 and key.strip("-_").isascii() for key in keys)
    assert page_key("../../x", "../../x").startswith("x-")


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("6.12.117-paprscm", "6.12"),
        ("6.12.48+deb13-powerpc64le", "6.12+deb13-powerpc64le"),
        ("7.3-rc2-00012-gabcdef012345", "7.3"),
        ("7.3-rc2+", "7.3"),
        ("10.0.13 (Debian 1:10.0.13)", "10.0"),
        ("custom", "custom"),
    ],
)
def test_branches(version: str, name: str) -> None:
    assert branch(version) == name


def test_the_name_of_a_track_has_only_what_differs() -> None:
    other = replace(GUEST, cpu="POWER10")
    records = [job(1, make_test("x")), job(2, make_test("x"))]
    assert {run.track for run in in_order(records)} == {"Linux 6.12, QEMU 10.0"}
    records[1] = replace(records[1], environments={"guest": other, "bare": BARE})
    assert [run.track for run in in_order(records)] == [
        *("Linux 6.12, QEMU 10.0, POWER9", "Linux 6.12, QEMU 10.0, POWER10"),
    ]


def test_changes_of_an_environment() -> None:
    before = job(1, make_test("x"), make_test("y", environment="bare"))
    after = job(2, *before.tests, release="6.12.117-paprscm")
    old, new = in_order([before, after])
    assert changes(old, new, "flush/test_x.py:X.x") == ["Linux 6.12.115 → 6.12.117"]
    assert changes(old, new, "flush/test_x.py:X.y") == []
    rebuilt = replace(GUEST, kernel=replace(KERNEL, release="6.12.115-paprscm", build_id="another"))
    qemu = Environment(qemu=replace(QEMU, sha256="0"))
    after = replace(
        job(2, *before.tests),
        environments={"guest": rebuilt, "bare": qemu},
        suite=replace(after.suite, commit="e" * 40),
    )
    old, new = in_order([before, after])
    suite = "suite 0.1.0 (ffffffffffff) → 0.1.0 (eeeeeeeeeeee)"
    assert changes(old, new, "flush/test_x.py:X.x") == ["Linux 6.12.115 was built again", suite]
    assert changes(old, new, "flush/test_x.py:X.y") == ["QEMU 10.0.13 was built again", suite]


# --- histories


@pytest.mark.parametrize(
    ("letters", "since", "good", "counts"),
    [
        ("ppff", "03", "02", (2, 4, False)),
        ("fpff", "03", "02", (3, 4, True)),
        ("ff", "01", None, (2, 2, False)),
        ("pfcf-f", "02", "01", (3, 4, False)),
        ("pfc", "02", "01", (1, 2, False)),
        ("wi", "02", "01", (1, 2, False)),
    ],
)
def test_a_broken_test(
    letters: str, since: str, good: str | None, counts: tuple[int, int, bool]
) -> None:
    """A cancelled test neither ends a breakage nor counts as a run."""
    found = breakage(letters)
    assert found is not None
    assert days([found.since]) == [since]
    assert (found.good and days([found.good])) == (good and [good])
    assert (found.broken, found.total, found.is_unsteady) == counts


@pytest.mark.parametrize("letters", ["p", "fp", "fw", "c", "-"])
def test_a_test_that_is_not_broken(letters: str) -> None:
    assert not any(h.breakages() for h in histories(in_order(verdicts(letters))))


def test_a_test_that_a_killed_job_did_not_reach_is_not_broken() -> None:
    never = make_test("x", "INTERRUPTED", times=None)
    history = only([*verdicts("p"), job(5, never)])
    assert history.breakages() == [] and history.last_failure is None


def test_a_test_that_a_killed_job_left_running_is_broken() -> None:
    record = job(5, make_test("x", "RUNNING"), end=None)
    assert only([record]).breakages()


def test_a_breakage_belongs_to_its_track_and_names_the_change() -> None:
    old = verdicts("pp")
    new = [
        job(3, make_test("x", "FAIL"), release="6.12.117-paprscm"),
        job(4, make_test("x"), release="7.2.13-paprscm"),
    ]
    (found,) = only([*old, *new]).breakages()
    assert (found.track, found.changes) == ("Linux 6.12, QEMU 10.0", ("Linux 6.12.115 → 6.12.117",))


def test_tests_are_sorted_by_subject_and_name() -> None:
    records = [
        job(1, make_test("b"), make_test("a", subject="hcall")),
        job(2, make_test("c"), make_test("a2")),
    ]
    names = [history.name.rpartition(".")[2] for history in histories(in_order(records))]
    assert names == ["a2", "b", "c", "a"]


def test_streaks() -> None:
    history = only(verdicts("ppf-fpc"))
    streaks = history.streaks("Linux 6.12, QEMU 10.0")
    assert [(s.status, days(s.runs)) for s in streaks] == [
        ("CANCEL", ["07"]),
        ("PASS", ["06"]),
        ("FAIL", ["03", "05"]),
        ("PASS", ["01", "02"]),
    ]


def test_known_issues() -> None:
    shows, gone = finding("linux-x"), finding("linux-x", shows=False)
    records = [
        job(1, make_test("a", "WARN", known_issues=(shows,)), make_test("b", known_issues=(gone,))),
        job(2, make_test("b", known_issues=(replace(gone, version="7.2.13"),))),
        job(3, make_test("b", known_issues=(finding("linux-y", shows=False),))),
        job(4, make_test("c", known_issues=(finding("linux-devdax-grants-map-sync"),))),
    ]
    first, second, third = issues(in_order(records))
    assert (first.name, first.severity) == ("linux-devdax-grants-map-sync", "silent data loss")
    assert (second.name, days(second.shown), days(second.gone)) == ("linux-x", ["01"], ["02"])
    assert second.versions == {"6.12.117-paprscm": 1} and second.gone_in == {"7.2.13": 1}
    assert second.tests == {"flush/test_x.py:X.a"} and second.severity == ""
    assert (third.name, third.shown) == ("linux-y", [])


# --- metrics


def measured(values: Sequence[float], status: Any = "PASS") -> list[Series]:
    records = [
        job(day, make_test("x", status, metrics=(Metric(name="m", value=value, unit="us"),)))
        for day, value in enumerate(values, 1)
    ]
    return series(only(records))


def test_the_noise_is_not_widened_by_the_outlier_that_it_shows() -> None:
    duration, metric = measured([10, 11, 10, 9, 10, 11, 50])
    assert duration.key.label == "duration of the test" and duration.band is not None
    assert metric.band is not None and metric.is_unusual
    assert metric.band.median == 10 and metric.band.high == pytest.approx(10 + 3 * 1.4826)
    assert not measured([10, 11, 10, 9, 10, 11, 12])[1].is_unusual


def test_a_change_that_does_not_matter_is_not_unusual() -> None:
    assert not measured([100.0, 100.0, 100.0, 100.0, 100.0, 102.9])[1].is_unusual
    assert measured([100.0, 100.0, 100.0, 100.0, 100.0, 103.1])[1].is_unusual


def test_another_count_is_unusual() -> None:
    records = [
        job(day, make_test("x", metrics=(Metric(name="m", value=value, unit="flushes"),)))
        for day, value in enumerate([50, 50, 50, 50, 50, 51], 1)
    ]
    assert series(only(records))[1].is_unusual


def test_few_runs_have_no_noise() -> None:
    _, metric = measured([1.0] * (RUNS_FOR_NOISE - 1))
    assert metric.band is None and not metric.is_unusual
    assert measured([1.0] * RUNS_FOR_NOISE)[1].band is not None


def test_a_run_counts_with_the_median_of_its_repetitions() -> None:
    values = (Metric(name="m", value=value, unit="us") for value in (1, 2, 90))
    _, metric = series(only([job(1, make_test("x", metrics=tuple(values)))]))
    assert [value for _, value in metric.points] == [2]


def test_another_host_has_another_noise() -> None:
    metric = Metric(name="m", value=1.0, unit="us")
    records = [job(day, make_test("x", metrics=(metric,))) for day in (1, 2, 3)]
    records[2] = replace(records[2], host=replace(records[2].host, cpu="Xeon"))
    found = [(one.place, len(one.points)) for one in series(only(records)) if one.key.label == "m"]
    track = "Linux 6.12, QEMU 10.0"
    assert found == [(f"{track}, Xeon, 2 cores", 1), (f"{track}, AMD EPYC, 2 cores", 2)]
    assert series(only(records[:2]))[0].place == track


def test_the_duration_of_a_failure_is_not_a_measurement() -> None:
    assert [one.key.label for one in measured([1.0], "FAIL")] == ["m"]


def test_numbers_that_overflow_are_left_out() -> None:
    assert [one.key.label for one in measured([1e308] * 6)] == ["duration of the test"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *(
            (0.159935, "0.1599"),
            (1234.5, "1234"),
            (12345678.0, "1.235e+07"),
            (4096.0, "4\u202f096"),
        ),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text
