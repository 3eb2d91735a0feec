# SPDX-License-Identifier: GPL-2.0-or-later
"""Write the record of a job with tests of this suite, while they run."""

from __future__ import annotations

import contextlib
import datetime
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from avocado.core.exceptions import JobError
from avocado.core.job import Job as AvocadoJob
from avocado.core.output import LOG_UI
from avocado.core.plugin_interfaces import ResultEvents
from avocado.core.task.runtime import RuntimeTask

from paprscm.errors import Error
from paprscm.formats.registry import parse_names
from paprscm.host.inventory import describe_host, describe_suite
from paprscm.plugins import fork_server
from paprscm.plugins.classes import ClassFacts, read_facts
from paprscm.plugins.parallel import suite_settings
from paprscm.results.observations import harmless, read_whiteboard
from paprscm.results.record import Job, Record, Status, Test, Times
from paprscm.results.writer import Writer

# Avocado's placeholder for a test without a reason.
_UNKNOWN = "<unknown>"
_REASON_LIMIT = 16_384
_FORMATS_LIMIT_S = 120


class Results(ResultEvents):
    """Writes record.json into the job's folder whenever a test starts or ends."""

    name = "paprscm-record"
    description = "Record of the job's tests: paprscm-results/1"
    # Before those that read the record at the end of the job.
    priority = 60

    def __init__(self, config: dict[str, Any]) -> None:
        del config
        self._writer: Writer | None = None
        self._folder = Path()
        self._formats = ""

    def pre_tests(self, job: AvocadoJob) -> None:
        """Record the job and its tests."""
        facts = read_facts(job)
        if not any(test.ours for test in facts.values()):
            return
        self._folder = Path(str(job.logdir))
        self._formats = suite_settings(job.test_suites[0]).formats
        try:
            parse_names(self._formats)
        except Error as error:
            raise JobError(f"{error}; no test was started") from error
        record = Record(job=_job(job), host=describe_host(), suite=describe_suite())
        self._writer = Writer(self._folder, record, _planned(job, facts))

    def start_test(self, _result: Any, state: dict[str, Any]) -> None:
        """Record the start of a test."""
        if self._writer is not None:
            test = self._writer.test(str(state["name"]))
            self._writer.update(replace(test, status="RUNNING", times=_times(state)))

    def test_progress(self, progress: bool = False) -> None:
        """Do nothing; the interface requires it."""

    def end_test(self, _result: Any, state: dict[str, Any]) -> None:
        """Record the verdict of a test and what it observed."""
        if self._writer is None:
            return
        observed = read_whiteboard(state.get("whiteboard"))
        times = replace(
            _times(state),
            duration_s=round(state["time_elapsed"], 4),
            activities=observed.activities,
            counts=observed.counts,
            cpu_s=observed.cpu_s,
        )
        reason = state.get("fail_reason") or ""
        test = replace(
            self._writer.test(str(state["name"])),
            status=cast(Status, state["status"]),
            reason=_shortened(observed.reason or ("" if reason == _UNKNOWN else str(reason))),
            hint=observed.hint,
            known_issues=tuple(observed.known_issues),
            metrics=tuple(observed.metrics),
            facts=observed.facts,
            times=times,
            logs=tuple(self._logs(Path(state["logdir"]))),
        )
        self._writer.update(test, observed.environment)

    def post_tests(self, job: AvocadoJob) -> None:
        """Record the end of the job."""
        if self._writer is None:
            return
        interruption = job.interrupted_reason
        status = int(job.exitcode)
        text = None if interruption is None else str(interruption) or "interrupted by the user"
        self._writer.close(end=_now(), status=status, interruption=text)
        if problem := self._writer.problem:
            LOG_UI.error("RECORD     : %s is not complete: %s", self._folder, problem.strerror)
        elif self._formats:
            words = [f"--format={self._formats}", f"--output={self._folder}", str(self._folder)]
            # In a child of the fork server, for the reason given in paprscm/plugins/classes.py.
            call = fork_server.call("paprscm.commands.cli:main", ["results", *words])
            if call.result(_FORMATS_LIMIT_S) != 0:
                LOG_UI.error("RECORD     : the formats %s were not written", self._formats)

    def _logs(self, folder: Path) -> Iterator[str]:
        """Paths of a test's logs: its own, then those of its guests."""
        with contextlib.suppress(OSError):
            for file in sorted(folder.glob("*.log")) + sorted(folder.glob("data/**/*.log")):
                yield str(file.relative_to(self._folder))


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")


def _job(job: AvocadoJob) -> Job:
    parameters = dict(job.config.get("run.test_parameters") or [])
    return Job(
        id=job.unique_id,
        start=_now(),
        command=tuple(harmless([Path(sys.argv[0]).name, *sys.argv[1:]])),
        folder=harmless(str(Path.cwd())),
        parameters={harmless(str(k)): harmless(str(v)) for k, v in parameters.items()},
    )


def _planned(job: AvocadoJob, facts: dict[str, ClassFacts]) -> Iterator[Test]:
    """The tests of a job, under the names that Avocado's runner will give them."""
    parameters = dict(job.config.get("run.test_parameters") or [])
    options = [word for name, value in parameters.items() for word in ("-p", f"{name}={value}")]
    for suite in job.test_suites:
        digits = len(str(len(suite.tests)))
        for number, runnable in enumerate(suite.tests, start=1):
            name = RuntimeTask.get_identifier(runnable, digits, number, suite.name)
            uri = str(runnable.uri)
            path, _, method = uri.rpartition(":")
            file = Path(path or uri)
            method = method.rpartition(".")[2]
            tests = facts[uri].tests if uri in facts else {}
            # Avocado takes the method for a regular expression.
            end = "$" if any(m != method and m.startswith(method) for m in tests) else ""
            yield Test(
                id=harmless(str(name)),
                name=harmless("/".join(f"{name.name}{name.str_variant}".split("/")[-2:])),
                file=harmless(str(file)),
                subject=harmless(file.resolve().parent.name),
                contract=tests[method].contract if method in tests else "",
                status="PLANNED",
                command=harmless(shlex.join(["avocado", "run", *options, f"{uri}{end}"])),
            )


def _times(state: dict[str, Any]) -> Times:
    start = datetime.datetime.fromtimestamp(state["actual_time_start"]).astimezone()
    return Times(
        start=start.isoformat(timespec="milliseconds"),
        began_s=round(state["time_start"], 4),
        duration_s=0.0,
    )


def _shortened(reason: str) -> str:
    text: str = harmless(reason)
    if len(text) <= _REASON_LIMIT:
        return text
    return f"{text[:_REASON_LIMIT]}… ({len(text) - _REASON_LIMIT} characters left out)"
