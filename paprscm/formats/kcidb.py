# SPDX-License-Identifier: GPL-2.0-or-later
"""KCIDB v5.3, the reports of KernelCI (kcidb-io 141).

Tests that judge QEMU without a kernel are left out: a test belongs to the build of a kernel. All
ids are deterministic, and a report contains final data only: sending an id again fills gaps in the
database, and never corrects.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from paprscm.formats.context import Context
from paprscm.results import labels
from paprscm.results.record import Environment, Kernel, Record, Test
from paprscm.results.text import explanation, one_line, plain, shortened

EXCERPT_LIMIT: Final = 16_384
_CULPRITS = {"Linux": "code", "QEMU": "tool", "Avocado": "harness"}
# QEMU, hw/ppc/spapr.c, spapr_build_fdt.
_COMPATIBLE = "qemu,pseries"


def render(record: Record, context: Context) -> str:
    """The report as JSON."""
    return dump(report(record, context))


def dump(data: dict[str, Any]) -> str:
    """The report as JSON; validated, which accepts NaN, and without NaN."""
    # Takes a third of a second, and few commands need it.
    from kcidb_io.schema.v05_03 import Version

    Version.validate(data)
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def report(record: Record, context: Context) -> dict[str, Any]:
    """The report of a job, as JSON values.

    Args:
        record: of the job.
        context: facts that the record does not have.
    """
    builder = _Report(record, context)
    for test in record.tests:
        environment = record.environment(test)
        if environment is not None and environment.kernel is not None:
            builder.add(test, environment, environment.kernel)
    lists = {name: list(objects.values()) for name, objects in builder.objects.items() if objects}
    return {"version": {"major": 5, "minor": 3}, **lists}


def status(test: Test) -> str:
    """The status of KCIDB: a known issue is a FAIL with an incident."""
    match test.status:
        case "WARN":
            return "FAIL" if test.shown else "PASS"
        case "CANCEL" | "SKIP":
            return "SKIP"
        case "INTERRUPTED":
            return "ERROR" if test.times else "MISS"
    return test.status


class _Report:
    def __init__(self, record: Record, context: Context) -> None:
        self._record = record
        self._context = context
        names = "checkouts", "builds", "tests", "issues", "incidents"
        self.objects: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}

    def add(self, test: Test, environment: Environment, kernel: Kernel) -> None:
        test_id = self._id(self._record.job.id, test.id)
        common = {
            "build_id": self._context.build or self._build(kernel),
            "environment": {
                "compatible": [_COMPATIBLE],
                "comment": plain(labels.title(environment)),
                "misc": {"platform": "qemu-pseries", **labels.describe(environment)},
            },
            **({"start_time": test.times.start} if test.times else {}),
        }
        skipped = status(test) in ("SKIP", "MISS")
        path = ".".join(["paprscm", *map(labels.safe, labels.parts(test))])
        fields: dict[str, Any] = {
            **common,
            "path": path,
            "status": status(test),
            "comment": one_line(test.reason if skipped else test.contract),
            "misc": {"rerun": plain(test.command), "verdict": test.status},
        }
        if test.times:
            fields["duration"] = test.times.duration_s
            fields["misc"]["runtime"] = test.times.duration_s
        text = f"{explanation(test)}\n{self._context.excerpts.get(test.id, '')}".strip()
        if text and test.status != "PASS":
            fields["log_excerpt"] = shortened(plain(text), EXCERPT_LIMIT)
        fields.update(self._logs(test))
        self._put("tests", test_id, fields)
        for number, metric in enumerate(test.metrics):
            name = labels.safe(labels.metric_label(metric).replace("=", "_"))
            value = {"value": metric.value, "unit": plain(metric.unit)}
            measured = {"path": f"{path}.{name}", "status": "DONE", "number": value}
            self._put("tests", self._id(test_id, "metric", number), {**common, **measured})
        self._issues(test, test_id)

    def _issues(self, test: Test, test_id: str) -> None:
        for issue in test.known_issues:
            issue_id = f"{self._context.origin}:{issue.name}"
            culprit = {name: name == _CULPRITS.get(issue.product) for name in _CULPRITS.values()}
            self._put(
                "issues",
                issue_id,
                {"version": 1, "report_subject": one_line(issue.title), "culprit": culprit},
            )
            self._put(
                "incidents",
                self._id(test_id, issue.name),
                {
                    "issue_id": issue_id,
                    "issue_version": 1,
                    "test_id": test_id,
                    "present": issue.shows,
                    "comment": one_line(issue.found),
                },
            )

    def _build(self, kernel: Kernel) -> str:
        source = kernel.source or f"{kernel.release} {kernel.build_id}"
        checkout = self._put(
            "checkouts", self._id(source), {"comment": plain(source), "valid": True}
        )
        facts = {
            "build_id": kernel.build_id,
            "config_sha256": kernel.config_sha256,
            "page_size_bytes": kernel.page_size_bytes,
        }
        return self._put(
            "builds",
            self._id(kernel.release, *facts.values()),
            {
                "checkout_id": checkout,
                "architecture": "powerpc",
                "comment": plain(kernel.release),
                "status": "PASS",
                "misc": {name: fact for name, fact in facts.items() if fact is not None},
            },
        )

    def _logs(self, test: Test) -> Iterator[tuple[str, Any]]:
        if not self._context.logs_url:
            return
        urls = [f"{self._context.logs_url}{log}" for log in test.logs]
        if urls:
            yield "log_url", urls[0]
        # The folders of a second guest have other names.
        names = ["-".join(log.split("/")[-2:]) for log in test.logs[1:]]
        files = [{"name": name, "url": url} for name, url in zip(names, urls[1:], strict=True)]
        if files:
            yield "output_files", files

    def _put(self, kind: str, object_id: str, fields: dict[str, Any]) -> str:
        head = {"id": object_id, "origin": self._context.origin}
        self.objects[kind].setdefault(object_id, {**head, **fields})
        return object_id

    def _id(self, *words: object) -> str:
        text = "\0".join(map(str, words))
        return f"{self._context.origin}:{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def left_out(record: Record) -> int:
    """Number of tests that no report contains, because they ran without a kernel."""
    kernels = Counter(
        environment is not None and environment.kernel is not None
        for environment in map(record.environment, record.tests)
    )
    return kernels[False]
