# SPDX-License-Identifier: GPL-2.0-or-later
"""List, at the end of a job, the files of known issues that need an update."""

from __future__ import annotations

import json
from typing import Any

from avocado.core.job import Job
from avocado.core.output import LOG_UI
from avocado.core.plugin_interfaces import JobPost

from paprscm.known_issues import updates
from paprscm.plugins.classes import read_facts


class KnownIssues(JobPost):
    """Prints a line for each known issue that is gone, or shows in a version before its 'Since'."""

    name = "paprscm-known-issues"
    description = "Known issues whose files need an update"

    def post(self, job: Job) -> None:
        """Read the whiteboards; a killed test has none."""
        if job.result is None or job.config.get("stdout_claimed_by"):
            return
        if not any(facts.ours for facts in read_facts(job).values()):
            return
        boards = [_board(test.get("whiteboard") or "") for test in job.result.tests]
        for sentence in updates(boards):
            LOG_UI.warning("UPDATE     : %s", sentence)


def _board(text: str) -> dict[str, Any]:
    """The content of a whiteboard; empty if a test of another project wrote it."""
    try:
        board = json.loads(text)
    except ValueError:
        return {}
    return board if isinstance(board, dict) else {}
