# SPDX-License-Identifier: GPL-2.0-or-later
"""List, at the end of a job, the files of known issues that need an update."""

from __future__ import annotations

import contextlib
from pathlib import Path

from avocado.core.job import Job
from avocado.core.output import LOG_UI
from avocado.core.plugin_interfaces import JobPost

from paprscm.errors import ConfigError
from paprscm.results.record import read_record, updates


class KnownIssues(JobPost):
    """Prints a line for each known issue that is gone, or shows in a version before its 'Since'."""

    name = "paprscm-known-issues"
    description = "Known issues whose files need an update"

    def post(self, job: Job) -> None:
        """Read the record; a job without tests of this suite has none."""
        if job.config.get("stdout_claimed_by"):
            return
        with contextlib.suppress(ConfigError):
            for sentence in updates(read_record(Path(str(job.logdir))).tests):
                LOG_UI.warning("UPDATE     : %s", sentence)
