# SPDX-License-Identifier: GPL-2.0-or-later
"""Longest tests first, so that no CPU is idle while the last, long test runs.

The durations of earlier runs are in one file of the cache. It is a hint: a file that is missing,
damaged or not writable is ignored.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path

from avocado.core.job import Job
from avocado.core.output import LOG_JOB
from avocado.core.plugin_interfaces import JobPost, JobPre

from paprscm.plugins.classes import read_facts
from paprscm.plugins.parallel import OPTION, suite_settings

FILE = "durations.json"
# Number of durations to keep: those of the latest tests.
_KEPT = 2000
# A test that ended with another status may not have done all its work.
_COMPLETE = {"PASS", "WARN"}


class LongestFirst(JobPre, JobPost):
    """Orders the tests of each suite with tests of ours by the durations of their latest runs."""

    name = "paprscm-order"
    description = "Longest tests first, if tests run concurrently"
    # After paprscm-parallel, which decides about the number of concurrent tests.
    priority = 30

    def pre(self, job: Job) -> None:
        """Sort the suites; a test without a known duration may be long, and comes first."""
        ours = {uri for uri, facts in read_facts(job).items() if facts.ours}
        for suite in job.test_suites:
            if ours.isdisjoint(str(test.uri) for test in suite.tests):
                continue
            if suite.config[OPTION] < 2 or suite.config["run.shuffle"]:
                continue
            known = read_durations(suite_settings(suite).cache_dir / FILE)
            seconds = [known.get(_key(str(test.uri)), math.inf) for test in suite.tests]
            ranks = sorted(range(len(seconds)), key=lambda rank: -seconds[rank])
            suite.tests = [suite.tests[rank] for rank in ranks]
            LOG_JOB.info(
                "Order of the tests: longest first; the durations of %d of %d are known",
                len(seconds) - seconds.count(math.inf),
                len(seconds),
            )

    def post(self, job: Job) -> None:
        """Store the durations of the job's complete tests."""
        if job.result is None or not any(facts.ours for facts in read_facts(job).values()):
            return
        seconds = {
            _key(str(test["name"])): round(test["time_elapsed"], 2)
            for test in job.result.tests
            if test.get("status") in _COMPLETE
        }
        for suite in job.test_suites[:1] if seconds else ():
            write_durations(suite_settings(suite).cache_dir / FILE, seconds)


def read_durations(file: Path) -> dict[str, float]:
    """Stored duration of each test, s; empty if the file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        stored = json.loads(file.read_bytes())
        return {str(test): float(seconds) for test, seconds in stored.items()}
    return {}


def write_durations(file: Path, seconds: dict[str, float]) -> None:
    """Replace the durations of these tests; if the file cannot be written, do nothing."""
    known = {test: old for test, old in read_durations(file).items() if test not in seconds}
    latest = dict(list({**known, **seconds}.items())[-_KEPT:])
    part = file.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        try:
            part.write_text(json.dumps(latest))
            part.rename(file)
        finally:
            part.unlink(missing_ok=True)


def _key(name: str) -> str:
    """Folder, file, class and method: the same test in every checkout."""
    return "/".join(name.split("/")[-2:])
