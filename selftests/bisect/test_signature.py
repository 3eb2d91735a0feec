# SPDX-License-Identifier: GPL-2.0-or-later
"""The bug that a job's record shows."""

from __future__ import annotations

import pytest
from records import make_record, make_test

from paprscm.bisect.search import Outcome
from paprscm.bisect.signature import judge, named_test, normalized, signature

WRONG = make_test("a", "FAIL", reason="region 3 (DRC 0x90000004) has 17 flushes, 16 expected\nmore")


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("18 != 16 flushes", "N != N flushes"),
        ("BUG at ffffffffc0001234, cpu 1", "BUG at N, cpu N"),
        ("in 3.5 s: /tmp/x1/job-2/a.log is empty", "in N s: a.log is empty"),
        ("H_SCM_FLUSH returned H_P2 (-55)\nsecond line", "H_SCM_FLUSH returned H_PN (-N)"),
        ("read/write of deadbeef and face", "write of deadbeef and face"),
        ("", ""),
    ],
)
def test_reason_without_what_differs_between_runs(reason: str, expected: str) -> None:
    assert normalized(reason) == expected
    assert normalized(normalized(reason)) == expected


def test_the_first_failure_is_the_bug() -> None:
    other = make_test("b", "FAIL", reason="wrong")
    run = judge(make_record(make_test("0", "ERROR"), WRONG, other), "")
    assert (run.outcome, run.signature) == (Outcome.SHOWS, signature(WRONG))
    assert run.reason.startswith("flush/test_x.py:X.a: region 3 (DRC 0x90000004) has 17")
    assert "more" not in run.reason
    assert named_test(run.signature) == WRONG.name


def test_the_same_bug_with_other_numbers() -> None:
    again = make_test("a", "FAIL", reason="region 1 (DRC 0x90000001) has 40 flushes, 16 expected")
    assert judge(make_record(again), signature(WRONG)).outcome is Outcome.SHOWS
    for test in (
        make_test("a", "FAIL", reason="the guest does not boot"),
        make_test("b", "FAIL", reason=WRONG.reason),
    ):
        run = judge(make_record(test), signature(WRONG))
        assert run.outcome is Outcome.UNKNOWN
        assert "for another reason" in run.reason
        assert judge(make_record(test), signature(WRONG), any_failure=True).signature


def test_what_a_job_without_the_bug_says() -> None:
    passed = make_test("a", "PASS")
    wanted = signature(WRONG)
    assert judge(make_record(passed), wanted).outcome is Outcome.GONE
    assert judge(make_record(make_test("a", "WARN")), wanted).outcome is Outcome.GONE
    # Not each test can be run everywhere.
    canceled = make_test("b", "CANCEL", reason="no pmem")
    assert judge(make_record(canceled, passed), wanted).outcome is Outcome.GONE
    for record in (
        make_record(),
        make_record(canceled),
        make_record(passed, make_test("b", "ERROR", reason="no space")),
        make_record(passed, make_test("b", "INTERRUPTED")),
    ):
        run = judge(record, wanted)
        assert run.outcome is Outcome.UNKNOWN
        assert run.reason
