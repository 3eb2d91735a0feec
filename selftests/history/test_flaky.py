# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests whose verdict changes."""

from __future__ import annotations

from paprscm.history.verdicts import flaky_tests


def test_changes_are_counted_within_equal_conditions() -> None:
    verdicts = [
        *[("steady", "x", "PASS")] * 5,
        *[("flaky", "x", word) for word in ("PASS", "FAIL", "SKIP", "FAIL", "PASS", "INTERRUPTED")],
        # Two conditions, alternating: each of them has one verdict.
        *[("other", "x", "PASS"), ("other", "y", "FAIL")] * 4,
        *[("seldom", "x", word) for word in ["PASS"] * 30 + ["FAIL"]],
    ]
    flaky, seldom = flaky_tests(verdicts)
    assert (flaky.test, flaky.changes, flaky.pairs) == ("flaky", 2, 3)
    assert flaky.statuses == {"PASS": 2, "FAIL": 2}
    assert (seldom.test, seldom.changes, seldom.pairs) == ("seldom", 1, 30)
    low, high = seldom.interval
    assert 0 < low < 1 / 30 < high < 0.2
