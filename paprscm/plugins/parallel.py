# SPDX-License-Identifier: GPL-2.0-or-later
"""Default number of concurrent tests: as many as CPUs and memory allow.

Avocado's own default is the number of CPUs, regardless of memory and cgroup limits. Our default
replaces it before Avocado reads its files and its command line, so that a value from the user takes
precedence. It has a type of its own, by which a job recognizes a default.
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
    """A default, as opposed to a value from the user."""


class Propose(Init):
    """Sets the default for every Avocado that runs in this virtual environment."""

    name = "paprscm-parallel"
    description = "Default number of concurrent tests: as many as CPUs and memory allow"
    # After avocado.plugins.runner_nrunner, which registers the option.
    priority = 30

    def initialize(self) -> None:
        """Replace Avocado's default."""
        try:
            chosen = settings.load()
        except Error:
            # A job with tests of this suite reports the wrong setting.
            chosen = settings.Settings(cache_dir=Path())
        _AVOCADO.update_option(OPTION, Proposed(compute_budget(read_resources(), chosen).tests))


class Decide(JobPre):
    """Replaces the default in each test suite of a job by the number for its settings."""

    name = "paprscm-parallel"
    description = "Number of concurrent tests for the job's own settings"

    def pre(self, job: Job) -> None:
        """Apply `-p memory_mib=…`; restore Avocado's default in a suite without tests of ours."""
        ours = {uri for uri, facts in read_facts(job).items() if facts.ours}
        for suite in job.test_suites:
            if not isinstance(suite.config[OPTION], Proposed):
                continue
            if ours.isdisjoint(str(test.uri) for test in suite.tests):
                suite.config[OPTION] = _AVOCADO.as_full_dict()[OPTION]["default"]
                continue
            decided = compute_budget(read_resources(), suite_settings(suite))
            suite.config[OPTION] = decided.tests
            LOG_JOB.info("Tests side by side: %s", decided.reason)


def suite_settings(suite: TestSuite) -> settings.Settings:
    parameters = dict(suite.config.get("run.test_parameters") or [])
    return settings.load({k: v for k, v in parameters.items() if k in settings.names()})
