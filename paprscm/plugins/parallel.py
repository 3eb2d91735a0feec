# SPDX-License-Identifier: GPL-2.0-or-later
"""As many tests side by side as the machine has CPUs and memory for, unless the user says how many.

Avocado's own number is that of the machine's CPUs: it does not look at memory, nor at a limit that
it runs under. Ours takes its place before Avocado reads its files and its command line, so whatever
stands there wins. It is an int of a type of its own: so a job sees that it was not chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avocado.core.job import Job
from avocado.core.output import LOG_JOB
from avocado.core.plugin_interfaces import Init, JobPre
from avocado.core.settings import settings as avocado_settings
from avocado.core.suite import TestSuite

from paprscm import settings
from paprscm.errors import Error
from paprscm.host.resources import compute_budget, read_resources
from paprscm.plugins.classes import read_facts

OPTION = "run.max_parallel_tasks"
_AVOCADO: Any = avocado_settings


class Proposed(int):
    """A number that was not chosen."""


class Propose(Init):
    """Proposes the number to whatever Avocado is run in this virtual environment."""

    name = "paprscm-parallel"
    description = "Tests side by side: as many as the machine has CPUs and memory for"
    # After avocado.plugins.runner_nrunner, which registers the option.
    priority = 30

    def initialize(self) -> None:
        """Set it as if it were the default."""
        try:
            chosen = settings.load()
        except Error:
            # A job with tests of this suite reports what is wrong; no default is at fault here.
            chosen = settings.Settings(cache_dir=Path())
        _AVOCADO.update_option(OPTION, Proposed(compute_budget(read_resources(), chosen).tests))


class Decide(JobPre):
    """Decides, for each test suite of a job, about a number that was not chosen."""

    name = "paprscm-parallel"
    description = "Tests side by side, with the job's own settings"

    def pre(self, job: Job) -> None:
        """Take `-p memory_mib=…` into account; give back Avocado's number where no test is ours."""
        ours = {uri for uri, facts in read_facts(job).items() if facts.ours}
        for suite in job.test_suites:
            if not isinstance(suite.config[OPTION], Proposed):
                continue
            if ours.isdisjoint(str(test.uri) for test in suite.tests):
                suite.config[OPTION] = _AVOCADO.as_full_dict()[OPTION]["default"]
                continue
            decided = compute_budget(read_resources(), _settings(suite))
            suite.config[OPTION] = decided.tests
            LOG_JOB.info("Tests side by side: %s", decided.reason)


def _settings(suite: TestSuite) -> settings.Settings:
    given = dict(suite.config.get("run.test_parameters") or [])
    return settings.load({k: v for k, v in given.items() if k in settings.names()})
