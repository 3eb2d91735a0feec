# SPDX-License-Identifier: GPL-2.0-or-later
"""Evidence of a bug in the record of a job: the test that failed, and its reason."""

from __future__ import annotations

import re

from paprscm.bisect.search import Outcome, Run
from paprscm.results.record import BROKEN, Record, Test
from paprscm.results.text import first_line, shortened

_REASON_CHARACTERS = 160


def normalized(reason: str) -> str:
    """The first line of a test's reason without what differs between runs of the same bug.

    Addresses and numbers become "N", and paths their last part.
    """
    text = re.sub(r"(?<![\w.])/?(?:[\w.+-]+/)+", "", first_line(reason))
    text = re.sub(r"\b(?:0x)?(?=[0-9a-f]*\d)[0-9a-f]{6,}\b|\d+(?:\.\d+)?", "N", text)
    return " ".join(text.split())


def signature(test: Test) -> str:
    """Name and normalised reason of a failed test."""
    return f"{test.name}: {normalized(test.reason)}"


def judge(record: Record, wanted: str, *, any_failure: bool = False) -> Run:
    """Look for a bug in the record of a job.

    The outcome is UNKNOWN if a test was broken (ERROR, interrupted) or none could be run (CANCEL),
    unless another test shows the bug. WARN is not a failure: it is a known issue.

    Args:
        record: the job's record.
        wanted: signature of the bug; "" for the first failure.
        any_failure: each failure is the bug.
    """
    failed = [test for test in record.tests if test.status == "FAIL"]
    for test in failed:
        if any_failure or wanted in ("", signature(test)):
            reason = f"{test.name}: {shortened(first_line(test.reason), _REASON_CHARACTERS)}"
            return Run(Outcome.SHOWS, signature(test), reason)
    if failed:
        other = f"{failed[0].name} fails for another reason: {first_line(failed[0].reason)}"
        return Run(Outcome.UNKNOWN, reason=other)
    done = [test for test in record.tests if test.status in ("PASS", "WARN")]
    silent = [test for test in record.tests if test.status in BROKEN or not done]
    if silent:
        reason = f"{silent[0].name} ended as {silent[0].status}: {first_line(silent[0].reason)}"
        return Run(Outcome.UNKNOWN, reason=reason)
    return Run(Outcome.GONE) if done else Run(Outcome.UNKNOWN, reason="no test was run")


def named_test(text: str) -> str:
    """The name of the test in a signature."""
    return text.partition(": ")[0]
