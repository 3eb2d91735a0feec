# SPDX-License-Identifier: GPL-2.0-or-later
"""SQUAD: tests, metrics and metadata of one environment each.

SQUAD drops names of more than 256 characters and numbers that are not finite, without an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Final

from paprscm.formats.context import Context
from paprscm.formats.lava import dashboard_result
from paprscm.results import labels
from paprscm.results.record import Environment, Record, Test
from paprscm.results.text import plain, unique

NAME_LIMIT: Final = 256


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The form of one POST to /api/submit/GROUP/PROJECT/BUILD/ENVIRONMENT.

    Attributes:
        build: version of the kernel under test, or else of QEMU; one for the job.
        environment: slug.
        tests: "pass", "fail", "skip" or "unknown" by "suite/test".
        metrics: values and unit by "suite/test/metric".
        metadata: "job_id" makes it unique in the build: SQUAD refuses a second one.
    """

    build: str
    environment: str
    tests: dict[str, str]
    metrics: dict[str, dict[str, Any]]
    metadata: dict[str, str]


def submissions(record: Record) -> list[Submission]:
    """A submission for each environment of the job."""
    kernels = [e.kernel for e in record.environments.values() if e.kernel]
    versions = [e.qemu.version.split()[0] for e in record.environments.values()]
    build = kernels[0].release if kernels else f"qemu-{versions[0]}" if versions else "unknown"
    return [
        _submission(record, build, key, tests)
        for key, tests in labels.by_environment(record).items()
    ]


def render(record: Record, context: Context) -> str:
    """The submissions as JSON."""
    del context
    forms = [asdict(submission) for submission in submissions(record)]
    return json.dumps(forms, indent=1, allow_nan=False) + "\n"


def form(submission: Submission) -> dict[str, tuple[str, str, str]]:
    """The parts of the form: name, file name, content and its type."""
    parts = {
        "tests": submission.tests,
        "metrics": submission.metrics,
        "metadata": submission.metadata,
    }
    return {
        name: (f"{name}.json", json.dumps(part, allow_nan=False), "application/json")
        for name, part in parts.items()
    }


def _submission(record: Record, build: str, key: str, tests: list[Test]) -> Submission:
    environment = record.environments.get(key)
    metrics: dict[str, dict[str, Any]] = {}
    for test in tests:
        for metric in test.metrics:
            name = unique(f"{_name(test)}/{plain(labels.metric_label(metric))}", NAME_LIMIT)
            entry = metrics.setdefault(name, {"value": [], "unit": plain(metric.unit)})
            entry["value"].append(metric.value)
    issues = sorted({issue.name for test in tests for issue in test.shown})
    metadata = {
        "job_id": f"{record.job.id}-{key}",
        "datetime": record.job.start,
        "suite_commit": record.suite.commit or record.suite.version,
        "known_issues": " ".join(issues),
        **(labels.describe(environment) if environment else {}),
    }
    return Submission(
        build=_slug(build),
        environment=_environment(environment),
        tests={_name(test): dashboard_result(test) for test in tests},
        metrics=metrics,
        metadata={name: plain(value) for name, value in metadata.items()},
    )


def _environment(environment: Environment | None) -> str:
    if environment is None:
        return "unknown"
    words = ["qemu", environment.qemu.version.split()[0]]
    if (kernel := environment.kernel) is None:
        return _slug("-".join([*words, "without-kernel"]))
    pages = f"{kernel.page_size_bytes // 1024}k" if kernel.page_size_bytes else ""
    parts = [environment.accel, environment.cpu, kernel.mmu, pages]
    return _slug("-".join([*words, *(part for part in parts if part)]).lower())


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def _name(test: Test) -> str:
    subject, *rest = map(labels.safe, labels.parts(test))
    return unique(f"{subject}/{'.'.join(rest)}", NAME_LIMIT)
