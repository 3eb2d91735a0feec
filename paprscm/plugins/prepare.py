# SPDX-License-Identifier: GPL-2.0-or-later
"""Build or fetch what the guests of a job need before its first test starts."""

from __future__ import annotations

from pathlib import Path

from avocado.core.exceptions import JobError
from avocado.core.job import Job
from avocado.core.plugin_interfaces import JobPre

from paprscm import log, settings
from paprscm.environment import prepare
from paprscm.errors import Error


class Prepare(JobPre):
    """A kernel build inside the first test would count against that test's time limit."""

    name = "paprscm-prepare"
    description = "Guest kernel, userland and QEMU, before the first test"

    def pre(self, job: Job) -> None:
        """Prepare; a job that cannot have its guests fails at once, with one message."""
        if not _is_ours(job):
            return
        log.to_terminal()
        given = dict(job.config.get("run.test_parameters") or [])
        try:
            prepare(settings.load(given))
        except Error as error:
            raise JobError(str(error)) from error


def _is_ours(job: Job) -> bool:
    """Whether the job runs tests of this suite: the plugin is loaded for every job in the venv."""
    for suite in job.test_suites:
        for test in suite.tests:
            module = Path(str(test.uri).partition(":")[0])
            with_library = module.suffix == ".py" and module.is_file()
            if with_library and "paprscm.testcase" in module.read_text(errors="replace"):
                return True
    return False
