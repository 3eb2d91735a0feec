# SPDX-License-Identifier: GPL-2.0-or-later
"""Sites of `paprscm report` and their records, for selftests with and without a browser."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from many_records import many
from records import example

from paprscm.report.site import write_site
from paprscm.results.record import Metric, Record, Test

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"' onmouseover='alert(1)' x=\"",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[2J\x1b]0;title\x07\x1b[31mred",
    "\u202eoverride\u2066isolate\u2028line",
    "NUL\x00BEL\x07\x9b",
    "]]><!-- --><!DOCTYPE>&amp;&lt;",
    "javascript:alert(1)//../../../etc/passwd",
    "long" + "x" * 100_000,
)


RUNS_OF_A_TEXT = 16
"""Jobs of each hostile text; metrics and the kernel change after half of them."""


def hostile_record(change: Callable[[str], str], number: int = 0) -> Record:
    """A job whose texts are all changed; `number` is that of the job among those with the text."""
    is_late = number >= RUNS_OF_A_TEXT // 2
    record = example()
    broken = next(test for test in record.tests if test.status == "FAIL")
    named = [replace(broken, name=f"flush/test_x.py:X.{i}") for i in range(len(HOSTILE))]
    tests = [*record.tests, *named]
    return replace(
        record,
        tests=tuple(_changed(test, i, change, 1.5 + is_late) for i, test in enumerate(tests)),
        environments={
            key: replace(
                environment,
                qemu=replace(environment.qemu, version=change("10.0.13")),
                userland=change("Debian"),
                kernel=environment.kernel
                and replace(environment.kernel, release=change(f"6.12.{117 + is_late}")),
            )
            for key, environment in record.environments.items()
        },
        host=replace(record.host, cpu=change("cpu")),
        job=replace(
            record.job,
            id=change(f"{number:02}"),
            start=f"2026-11-{1 + number:02}T03:00:00+00:00",
            command=(change("avocado"),),
            interruption=change("reason"),
            end=None,
        ),
    )


def _changed(test: Test, number: int, change: Callable[[str], str], value: float) -> Test:
    issues = tuple(
        replace(issue, name=change(issue.name), title=change(issue.title), found=change("found"))
        for issue in test.known_issues
    )
    metric = Metric(name=change("m"), value=value, unit=change("s"), dimensions={"d": change("v")})
    return replace(
        test,
        name=change(f"{test.name} {number}"),
        file=change(test.file),
        subject=change("flush"),
        contract=change("Contract"),
        reason=change("Reason"),
        hint=change("Hint"),
        logs=(change("log"), "a/console.log"),
        command=change("avocado run"),
        known_issues=issues,
        metrics=(*test.metrics, metric),
    )


def _append(hostile: str, text: str) -> str:
    return text + hostile


def write_hostile(folder: Path, texts: tuple[str, ...] = HOSTILE) -> Path:
    """A site of jobs with hostile texts; the folder has as many pages as with other texts."""
    records = [
        hostile_record(functools.partial(_append, hostile), number)
        for hostile in texts
        for number in range(RUNS_OF_A_TEXT)
    ]
    records = [
        replace(record, job=replace(record.job, id=f"{number}{record.job.id}"))
        for number, record in enumerate(records)
    ]
    write_site(records, folder, console=lambda _record, _test: list(texts))
    return folder


def write_many(folder: Path, runs: int = 200, tests: int = 300) -> Path:
    """A site of many jobs."""
    write_site(
        many(runs, tests), folder, console=lambda _record, _test: ["a line", "the last line"]
    )
    return folder
