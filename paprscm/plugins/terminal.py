# SPDX-License-Identifier: GPL-2.0-or-later
"""Output of a job: a line for each test, and at the end the tests that broke and the counts.

avocado.cfg disables Avocado's own output (result_events.human), which repeats the text of a known
issue for each test. Where it is enabled, only the end of the job is printed.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from avocado.core.job import Job
from avocado.core.output import LOG_UI, TERM_SUPPORT
from avocado.core.plugin_interfaces import Init, ResultEvents
from rich.console import Console

from paprscm.errors import Error
from paprscm.formats.context import read_context
from paprscm.results.record import read_record
from paprscm.results.terminal import print_progress, print_summary
from paprscm.settings import Settings

_HUMAN = "result_events.human"
# Of Avocado's counts, in its order.
_COUNTS = (
    *(("PASS", "passed"), ("ERROR", "errors"), ("FAIL", "failed"), ("SKIP", "skipped")),
    *(("WARN", "warned"), ("INTERRUPT", "interrupted"), ("CANCEL", "cancelled")),
)


class NoColor(Init):
    """Makes Avocado's own lines respect NO_COLOR (https://no-color.org), as rich does."""

    name = "paprscm-no-color"
    description = "NO_COLOR for Avocado's own output"

    def initialize(self) -> None:
        """Disable its colours, which it has chosen when it was imported."""
        if os.environ.get("NO_COLOR"):
            TERM_SUPPORT.disable()


class Terminal(ResultEvents):
    """Prints the progress of a job, and its results at the end."""

    name = "paprscm-terminal"
    description = "Progress and results of the job on the terminal"
    # After paprscm-record, which completes the record.
    priority = 40

    def __init__(self, config: dict[str, Any]) -> None:
        self._silent = bool(config.get("stdout_claimed_by"))
        self._alone = _HUMAN in config.get("plugins.disable", [])
        self._color = config.get("runner.output.color")
        self._ended = 0

    def pre_tests(self, job: Job) -> None:
        """Print the head of the job."""
        if self._alone and not self._silent:
            LOG_UI.debug("JOB ID     : %s", job.unique_id)
            LOG_UI.debug("JOB LOG    : %s", job.logfile)

    def start_test(self, result: Any, state: dict[str, Any]) -> None:
        """Print nothing: a test takes seconds."""

    def test_progress(self, progress: bool = False) -> None:
        """Print nothing."""

    def end_test(self, result: Any, state: dict[str, Any]) -> None:
        """Print the verdict of a test."""
        self._ended += 1
        if self._silent or not self._alone:
            return
        console = self._console()
        skipped = state["status"] == "SKIP"
        with console.capture() as captured:
            print_progress(
                console,
                str(state["status"]),
                f"{state['name'].name}{state['name'].str_variant}",
                count=(self._ended, result.tests_total),
                duration_s=None if skipped else state.get("time_elapsed"),
                reason=str(state.get("fail_reason") or ""),
            )
        LOG_UI.debug("%s", captured.get().rstrip())

    def post_tests(self, job: Job) -> None:
        """Print the end of the job."""
        if self._silent:
            return
        folder = Path(str(job.logdir))
        try:
            record = read_record(folder)
            context = read_context(record, folder, Settings(cache_dir=Path()))
        except Error:
            # No test of this suite, or a full disk, which paprscm-record has reported.
            pass
        else:
            console = self._console()
            with console.capture() as captured:
                print_summary(console, record, _short(folder), context.excerpts)
            lines = (line.rstrip() for line in captured.get().splitlines())
            LOG_UI.debug("%s", "\n".join(lines))
        if self._alone:
            if job.interrupted_reason is not None:
                LOG_UI.warning(job.interrupted_reason)
            if job.status == "PASS":
                counts = (f"{name} {getattr(job.result, field)}" for name, field in _COUNTS)
                LOG_UI.debug("RESULTS    : %s", " | ".join(counts))

    def _console(self) -> Console:
        """A console that renders for the standard output."""
        forced = {"always": True, "never": False}.get(str(self._color))
        width = shutil.get_terminal_size((100, 24)).columns
        return Console(file=sys.stdout, force_terminal=forced, width=width, highlight=False)


def _short(folder: Path) -> Path:
    """The folder relative to the working directory, if it is inside."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
