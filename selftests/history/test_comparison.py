# SPDX-License-Identifier: GPL-2.0-or-later
"""Comparison of sets of runs: conditions, verdicts, known issues, metrics."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from typing import Any

import pytest
from records import BARE, GUEST, KERNEL, QEMU, finding, make_record, make_test
from rich.console import Console

from paprscm.errors import ConfigError
from paprscm.history.comparison import Comparison, compare
from paprscm.history.metrics import Key, run_medians
from paprscm.history.terminal import print_comparison
from paprscm.history.verdicts import issue_changes, only_in, verdict_changes
from paprscm.results.record import Environment, Metric, Record, Test

OTHER_KERNEL = replace(GUEST, kernel=replace(KERNEL, build_id="ffff", config_sha256="ee" * 32))


def runs(
    name: str, count: int, *tests: Test, environment: Environment = GUEST, **changes: Any
) -> list[Record]:
    """Runs with equal tests."""
    record = make_record(*tests, **changes)
    return [
        replace(
            record,
            job=replace(record.job, id=f"{name}{number}"),
            environments={"guest": environment, "bare": BARE},
        )
        for number in range(count)
    ]


def measured(
    name: str, count: int, factor: float = 1.0, *, host: float = 0.0, **changes: Any
) -> list[Record]:
    """Runs with noisy metrics: times grow by `factor`, rates shrink by it.

    Args:
        name: beginning of the ids.
        count: number of runs.
        factor: of the second test, not of the first one.
        host: noise from run to run that all times and rates share.
        changes: as for runs().
    """
    generator = random.Random(name)  # noqa: S311
    found = []
    for record in runs(name, count, **changes):
        speed = generator.lognormvariate(0, host)

        def metric(name: str, value: float, unit: str, **dimensions: str) -> Metric:
            noise = generator.lognormvariate(0, 0.02)
            return Metric(name=name, value=value * noise, unit=unit, dimensions=dimensions)

        steady = [metric("polls", 100, "hcalls"), metric("call_median", 0.1 * speed, "s")]
        slow = [metric("fsync", 0.2 * speed * factor, "s", load="xfs") for _ in range(5)]
        slow.append(metric("flush_rate", 900 / speed / factor, "flushes/s"))
        slow.append(metric("reference", 0.5 * speed, "s"))
        starts = [metric("guest_start", 0.6 * speed, "s") for _ in range(2)]
        tests = (
            make_test("steady", metrics=tuple(steady + starts[:1])),
            make_test("slow", metrics=tuple(slow + starts[1:])),
        )
        found.append(replace(record, tests=tests))
    return found


def changed(found: Comparison) -> dict[str, str]:
    return {result.metric: result.change for result in found.metrics if result.change}


# --- metrics


def test_a_slow_down_is_found() -> None:
    found = compare(measured("a", 6), measured("b", 6, 1.2), reference="reference")
    assert changed(found) == {"fsync load=xfs": "worse", "flush_rate": "worse"}
    assert found.status == 1
    fsync, rate, *_ = sorted(found.metrics, key=lambda one: one.metric not in changed(found))
    by_name = {one.metric: one for one in (fsync, rate)}
    assert by_name["fsync load=xfs"].shift == pytest.approx(0.2, abs=0.05)
    assert by_name["flush_rate"].shift == pytest.approx(1 / 1.2 - 1, abs=0.05)
    better = compare(measured("b", 6, 1.2), measured("a", 6))
    assert set(changed(better).values()) == {"better"}
    assert better.status == 0


def test_equal_sets_are_equal() -> None:
    constant = Metric(name="rows", value=7, unit="rows")
    a, c = (
        [replace(r, tests=(*r.tests, make_test("x", metrics=(constant,)))) for r in records]
        for records in (measured("a", 6), measured("c", 6))
    )
    found = compare(a, c)
    assert (changed(found), found.status) == ({}, 0)
    names = [(one.test, one.metric) for one in found.metrics]
    assert ("", "guest_start") in names
    assert len(names) == 6


def test_a_reference_removes_the_noise_of_the_host() -> None:
    a, b = measured("a", 6, host=0.3), measured("b", 6, 1.2, host=0.3)
    found = compare(a, b)
    assert found.reference == "reference"
    assert changed(found) == {"fsync load=xfs": "worse", "flush_rate": "worse"}

    def without(records: list[Record]) -> list[Record]:
        tests = [
            tuple(
                replace(t, metrics=tuple(m for m in t.metrics if m.name != "reference"))
                for t in record.tests
            )
            for record in records
        ]
        return [replace(r, tests=own) for r, own in zip(records, tests, strict=True)]

    bare = compare(without(a), without(b))
    assert (bare.reference, changed(bare)) == ("", {})
    assert compare(a, b, reference="call_median").reference == "call_median"


def test_a_reference_that_has_changed_is_named() -> None:
    a, b = measured("a", 6), measured("b", 6, 1.5)
    found = compare(a, b, reference="fsync load=xfs")
    assert any("the reference has changed by +5" in warning for warning in found.warnings)


@pytest.mark.parametrize("name", ["nothing", "polls"])
def test_a_reference_that_is_not_one_metric(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--reference={name} is not one metric"):
        compare(measured("a", 4), measured("b", 4), reference=name)


def test_counts_have_no_direction() -> None:
    def counted(name: str, value: float) -> list[Record]:
        metric = Metric(name="polls", value=value, unit="hcalls")
        return runs(name, 6, make_test("a", metrics=(metric,)))

    found = compare(counted("a", 100), counted("b", 150))
    assert (changed(found), found.status) == ({"polls": "changed"}, 0)
    leaks = compare(counted("c", 0), counted("d", 3)).metrics[0]
    assert (leaks.is_relative, leaks.shift, leaks.change) == (False, 3, "changed")


def test_repetitions_are_one_number_of_the_run() -> None:
    """An outlier of a run moves its mean, not its median."""

    def repeated(name: str, last: float) -> list[Record]:
        values = (1.0, 1.1, 1.2, 1.3, last)
        metrics = tuple(Metric(name="m", value=value, unit="s") for value in values)
        return runs(name, 4, make_test("a", metrics=metrics))

    assert list(run_medians([*repeated("a", 1.4), *repeated("b", 50)]).values()) == [[1.2] * 8]


def test_a_metric_of_all_tests_counts_for_the_tests_that_all_runs_have() -> None:
    def starting(name: str, start_s: float) -> Test:
        return make_test(name, metrics=(Metric(name="guest_start", value=start_s, unit="s"),))

    (one,) = runs("a", 1, starting("both", 1), starting("slow", 9))
    (two,) = runs("b", 1, starting("both", 1))
    assert list(run_medians([one, two]).values()) == [[1, 1]]


@pytest.mark.parametrize(
    ("name", "unit", "direction", "minimum"),
    [
        ("call_median", "s", -1, 0.03),
        ("flush_rate", "flushes/s", 1, 0.03),
        ("call_longest", "s", -1, 0.1),
        ("memory_of_destination", "MiB", -1, 0.1),
        ("polls", "hcalls", 0, 0.1),
    ],
)
def test_direction_and_minimum(name: str, unit: str, direction: int, minimum: float) -> None:
    key = Key("t", name, unit, name)
    assert (key.direction, key.minimum) == (direction, minimum)


def test_a_minimum_that_is_given() -> None:
    a, b = measured("a", 6), measured("b", 6, 1.2)
    assert changed(compare(a, b, minimum=0.3)) == {}
    assert compare(a, b, minimum=0.3).metrics[0].minimum == pytest.approx(0.3)


def test_metrics_of_tests_that_failed_do_not_count() -> None:
    a = measured("a", 6)
    b = [
        replace(record, tests=(record.tests[0], replace(record.tests[1], status="FAIL")))
        for record in measured("b", 6, 3)
    ]
    found = compare(a, b)
    assert {one.metric for one in found.metrics} == {"polls", "call_median", "guest_start"}
    # guest_start of the test that all runs have.
    assert changed(found) == {}
    assert found.warnings == ("not normalized, runs without the metric reference: 6",)


# --- what is not comparable


def test_one_run_against_one() -> None:
    found = compare(measured("a", 1), measured("b", 1, 3))
    assert found.status == 2
    assert found.obstacles[0].startswith("noise unknown: 1 against 1 runs")
    assert found.metrics == ()


@pytest.mark.parametrize(("a", "b", "status"), [(3, 4, 2), (4, 4, 0), (2, 8, 0), (3, 5, 0)])
def test_sizes_of_sets(a: int, b: int, status: int) -> None:
    assert compare(measured("a", a), measured("c", b)).status == status


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        ({"parameters": {"cycles": "9"}}, "the sets differ in their parameters"),
        (
            {"environment": replace(GUEST, settings={"scratch_dir": "/dev/shm"})},  # noqa: S108
            "the sets differ in their settings",
        ),
    ],
)
def test_conditions_that_must_be_equal(change: dict[str, Any], obstacle: str) -> None:
    a, b = measured("a", 6), measured("b", 6, 1.2, **change)
    found = compare(a, b)
    assert (found.obstacles, found.status) == ((obstacle,), 2)
    anyway = compare(a, b, anyway=True)
    assert obstacle in anyway.warnings
    assert anyway.status == 1


def test_another_host() -> None:
    b = [replace(r, host=replace(r.host, cpu="POWER9")) for r in measured("b", 6)]
    found = compare(measured("a", 6), b)
    assert found.obstacles == ("the sets differ in their host",)
    assert found.differences["host"] == (
        "AMD EPYC, 2 cores, x86_64, 6.18",
        "POWER9, 2 cores, x86_64, 6.18",
    )


def test_a_kernel_that_is_compared_is_not_an_obstacle() -> None:
    found = compare(measured("a", 6), measured("b", 6, environment=OTHER_KERNEL))
    assert found.differences.keys() == {"kernel", "kernel configuration"}
    assert (found.obstacles, found.warnings) == ((), ())
    both = replace(OTHER_KERNEL, qemu=replace(QEMU, version="11.1", sha256="1"))
    (warning,) = compare(measured("a", 6), measured("b", 6, environment=both)).warnings
    assert warning.startswith("the sets differ in QEMU, kernel: a change cannot be attributed")


def test_a_set_that_mixes_kernels() -> None:
    a = [*measured("a", 3), *measured("x", 3, environment=OTHER_KERNEL)]
    (obstacle,) = compare(a, measured("b", 6)).obstacles[:1]
    assert obstacle.startswith("the first set mixes runs with different kernel: 6.12.117-paprscm")


def test_another_commit_of_the_suite_is_a_warning() -> None:
    b = [replace(r, suite=replace(r.suite, modified=True)) for r in measured("b", 6)]
    (warning,) = compare(measured("a", 6), b).warnings
    assert "differ in the commit of the suite" in warning


def test_an_interrupted_run_is_a_warning() -> None:
    (warning,) = compare(measured("a", 6, end=None), measured("b", 6)).warnings
    assert warning == "the first set has runs that were interrupted: 6 of 6"


def test_a_run_that_is_given_twice() -> None:
    a = measured("a", 4)
    with pytest.raises(ConfigError, match=r"run a1@.* is given twice"):
        compare(a, [*measured("b", 4), a[1]])


# --- verdicts and known issues


def statuses(name: str, *words: str) -> list[Record]:
    """Runs of one test with these statuses."""
    return [
        record
        for number, word in enumerate(words)
        for record in runs(f"{name}{number}-", 1, make_test("a", word))
    ]


@pytest.mark.parametrize(
    ("a", "b", "change"),
    [
        ("PASS PASS", "FAIL FAIL", "worse"),
        ("PASS WARN", "ERROR FAIL", "worse"),
        ("FAIL FAIL", "PASS PASS", "better"),
        ("PASS PASS", "WARN WARN", "changed"),
        ("PASS PASS", "PASS PASS", None),
        ("FAIL FAIL", "FAIL FAIL", None),
        ("PASS " * 6, "PASS " * 5 + "FAIL", "varies"),
        ("PASS FAIL", "PASS FAIL", "varies"),
        ("PASS " * 10, "FAIL " * 9 + "PASS", "worse"),
        ("FAIL " * 9 + "PASS", "PASS " * 10, "better"),
        # No verdict.
        ("PASS PASS", "CANCEL CANCEL", None),
        ("PASS PASS", "INTERRUPTED FAIL", "worse"),
    ],
)
def test_verdicts(a: str, b: str, change: str | None) -> None:
    found = verdict_changes(statuses("a", *a.split()), statuses("b", *b.split()))
    assert [one.change for one in found] == ([change] if change else [])


def test_tests_in_one_set_only() -> None:
    a = runs("a", 2, make_test("both"), make_test("lost"))
    b = runs("b", 2, make_test("both"), make_test("lost", "CANCEL"), make_test("new", "FAIL"))
    assert only_in(a, b) == ["flush/test_x.py:X.lost"]
    found = compare(a, b, anyway=True)
    assert (found.gone, found.new) == (("flush/test_x.py:X.lost",), ("flush/test_x.py:X.new",))


@pytest.mark.parametrize(
    ("a", "b", "change"),
    [
        ("no no", "yes yes", "worse"),
        ("yes yes", "no no", "better"),
        ("yes yes", "yes yes", None),
        ("no no no", "no no yes", "varies"),
        # Not looked for.
        ("- -", "yes yes", None),
        ("no -", "yes -", "worse"),
        ("no " * 10, "yes " * 9 + "no", "worse"),
    ],
)
def test_known_issues(a: str, b: str, change: str | None) -> None:
    def records(name: str, words: str) -> list[Record]:
        issues = {"no": (finding("i", shows=False),), "yes": (finding("i"),), "-": ()}
        tests = [make_test("a", known_issues=issues[word]) for word in words.split()]
        return [runs(f"{name}{n}-", 1, test)[0] for n, test in enumerate(tests)]

    found = issue_changes(records("a", a), records("b", b))
    assert [one.change for one in found] == ([change] if change else [])


# --- the terminal


def printed(found: Comparison, width: int, *, every_metric: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    with console.capture() as captured:
        print_comparison(console, found, every_metric=every_metric)
    return captured.get()


@pytest.mark.parametrize("width", [80, 160])
def test_the_terminal(width: int) -> None:
    a = measured("a", 6, environment=GUEST)
    b = measured("b", 6, 1.2, environment=OTHER_KERNEL)
    hostile = make_test("\x1b[31m\u202e", "FAIL", known_issues=(finding("linux-x"),))
    quiet = replace(hostile, status="PASS", known_issues=(finding("linux-x", shows=False),))
    a = [replace(r, tests=(*r.tests, quiet)) for r in a]
    b = [replace(r, tests=(*r.tests, hostile)) for r in b]
    text = printed(compare(a, b), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "kernel                6.12.117-paprscm 0b27d1a5 → 6.12.117-paprscm ffff" in text
    assert "worse: 1 verdicts, 1 known issues, 2 metrics" in text
    assert "linux-x: linux-x breaks" in text
    assert "0 of 6" in text
    assert "would have been" in text
    assert "guest_start" not in text
    assert "guest_start" in printed(compare(a, b), width, every_metric=True)


def test_the_terminal_without_a_change_or_a_comparison() -> None:
    assert printed(compare(measured("a", 6), measured("c", 6)), 80).endswith(
        "nothing has changed\n"
    )
    text = printed(compare(measured("a", 1), measured("b", 1)), 160)
    assert "not comparable: noise unknown: 1 against 1 runs" in text
    assert "hint: paprscm bench ab\n" in text
    other = compare(measured("a", 6), measured("b", 6, parameters={"cycles": "9"}))
    assert "hint: --anyway compares them\n" in printed(other, 160)
    assert "nothing has changed" not in text
