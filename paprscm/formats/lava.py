# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals that LAVA reads from the standard output of a job."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from paprscm.formats.context import Context
from paprscm.results import labels
from paprscm.results.record import Record, Test

_RESULTS = {"PASS": "pass", "CANCEL": "skip", "SKIP": "skip", "FAIL": "fail", "ERROR": "fail"}


def render(record: Record, context: Context) -> str:
    """A test set for each subject; each metric is a test case with a measurement."""
    del context
    lines = []
    for subject, tests in itertools.groupby(
        sorted(record.tests, key=lambda test: test.subject), key=lambda test: test.subject
    ):
        lines.append(f"<LAVA_SIGNAL_TESTSET START {labels.safe(subject)}>")
        lines += itertools.chain.from_iterable(map(_signals, tests))
        lines.append("<LAVA_SIGNAL_TESTSET STOP>")
    return "\n".join(lines) + "\n"


def dashboard_result(test: Test) -> str:
    """ "pass", "fail", "skip" or "unknown"; a known issue that shows is a "fail"."""
    if test.status == "WARN":
        return "fail" if test.shown else "pass"
    return _RESULTS.get(test.status, "unknown")


def _signals(test: Test) -> Iterator[str]:
    name = ".".join(map(labels.safe, labels.parts(test)[1:]))
    yield f"<LAVA_SIGNAL_TESTCASE TEST_CASE_ID={name} RESULT={dashboard_result(test)}>"
    for metric in test.metrics:
        label = labels.safe(labels.metric_label(metric).replace("=", "_"))
        yield (
            f"<LAVA_SIGNAL_TESTCASE TEST_CASE_ID={name}.{label} RESULT=pass "
            f"MEASUREMENT={metric.value:.12g} UNITS={metric.unit.replace(' ', '_')}>"
        )
