# SPDX-License-Identifier: GPL-2.0-or-later
"""KTAP, the kernel's test format (Linux Documentation/dev-tools/ktap.rst)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from paprscm.formats.context import Context
from paprscm.results import labels
from paprscm.results.record import BROKEN, Record, Test
from paprscm.results.text import explanation, first_line, plain

_VERSION = "KTAP version 1"
# At such a line of a console kunit.py stops to read (kunit_parser.py, KTAP_END).
_ENDS = re.compile(r"List of all partitions:|not syncing: VFS:|reboot: System halted")


def render(record: Record, context: Context) -> str:
    """A subtest for each subject; known issues and reasons are diagnostics before the result."""
    subjects: dict[str, list[Test]] = {}
    for test in record.tests:
        subjects.setdefault(labels.safe(test.subject), []).append(test)
    lines = [_VERSION, f"1..{len(subjects)}"]
    for number, (subject, tests) in enumerate(subjects.items(), start=1):
        body = [_VERSION, f"# Subtest: {subject}", f"1..{len(tests)}"]
        for count, test in enumerate(tests, start=1):
            body += _test(count, test, context.excerpts.get(test.id, ""))
        lines += [f"    {line}" for line in body]
        result = "not ok" if any(test.status in BROKEN for test in tests) else "ok"
        lines.append(f"{result} {number} {subject}")
    return "\n".join(lines) + "\n"


def _test(number: int, test: Test, excerpt: str) -> Iterator[str]:
    name = ".".join(map(labels.safe, labels.parts(test)[1:]))
    skipped = test.status in ("CANCEL", "SKIP")
    if not skipped and test.status != "PASS":
        for line in plain(f"{test.status}: {explanation(test)}\n{excerpt}").splitlines():
            # Without the bar, "Subtest: x" would begin a subtest.
            if line.strip() and not _ENDS.search(line):
                yield f"# | {line}"
    for metric in test.metrics:
        yield f"# {plain(labels.metric_label(metric))}: {metric.value:.12g} {plain(metric.unit)}"
    result = "not ok" if test.status in BROKEN else "ok"
    reason = first_line(test.reason).replace("#", "")
    yield f"{result} {number} {name}" + (f" # SKIP {reason}" if skipped else "")
