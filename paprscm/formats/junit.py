# SPDX-License-Identifier: GPL-2.0-or-later
"""JUnit XML, for GitLab, Jenkins, Buildkite and others."""

from __future__ import annotations

from junitparser import Error, Failure, JUnitXml, Properties, Property, Skipped, TestCase, TestSuite

from paprscm.formats.context import Context
from paprscm.results import labels
from paprscm.results.record import Record, Test
from paprscm.results.text import explanation, first_line, plain

_SKIPPED = "CANCEL", "SKIP"


def render(record: Record, context: Context) -> str:
    """A suite for each environment; a test that ends as WARN passes, with its known issues.

    Args:
        record: of the job.
        context: facts that the record does not have.
    """
    xml = JUnitXml("paprscm")
    for key, tests in labels.by_environment(record).items():
        environment = record.environments.get(key)
        suite = TestSuite(plain(labels.title(environment)))
        suite.timestamp = record.job.start
        properties = {
            "schema": record.schema,
            "job": record.job.id,
            "suite_commit": record.suite.commit or record.suite.version,
            "host": f"{record.host.cpu}, {record.host.distribution}",
            **(labels.describe(environment) if environment else {}),
        }
        for name, value in properties.items():
            suite.add_property(name, plain(value))
        suite.add_testcases([_case(test, context.excerpts.get(test.id, "")) for test in tests])
        xml.add_testsuite(suite)
    xml.update_statistics()
    text: bytes = xml.tostring()
    return text.decode()


def _case(test: Test, excerpt: str) -> TestCase:
    *folders, name = labels.parts(test)
    case = TestCase(plain(name), plain(".".join(folders)))
    case.time = test.times.duration_s if test.times else 0.0
    case.append(_properties(test))
    message = first_line(test.reason)
    if test.status in _SKIPPED:
        result: Error | Failure | Skipped = Skipped(message, test.status)
    elif test.status == "FAIL":
        result = Failure(message, test.status)
    elif test.status in ("ERROR", "INTERRUPTED"):
        result = Error(message, test.status)
    else:
        if test.reason:
            case.system_out = explanation(test)
        return case
    console = f"\n\nthe console's last lines:\n{excerpt}" if excerpt else ""
    result.text = explanation(test) + plain(console)
    case.result = [result]
    return case


def _properties(test: Test) -> Properties:
    pairs = [("status", test.status), ("contract", test.contract), ("rerun", test.command)]
    for issue in test.known_issues:
        state = "shows" if issue.shows else "does not show"
        pairs.append((f"known issue {issue.name}", f"{state} on {issue.product} {issue.version}"))
    for metric in test.metrics:
        pairs.append((labels.metric_label(metric), f"{metric.value:.12g} {metric.unit}"))
    pairs += [("log", log) for log in test.logs]
    properties = Properties()
    for name, value in pairs:
        properties.add_property(Property(plain(name), plain(value)))
    return properties
