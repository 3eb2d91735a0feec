# SPDX-License-Identifier: GPL-2.0-or-later
"""Build or fetch what the guests of a job need before its first test starts."""

from __future__ import annotations

import difflib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from avocado.core.exceptions import JobError
from avocado.core.job import Job
from avocado.core.output import LOG_UI
from avocado.core.plugin_interfaces import JobPre

from paprscm import settings
from paprscm.errors import CAPABILITY_STATUS
from paprscm.host.process import join_run
from paprscm.plugins.classes import read_facts

# So many tests with guests save more time than it takes to make a snapshot.
_WORTH_A_SNAPSHOT = 8
# "sead" and "seed", "memory" and "memory_mib"; not "cuts" and "cpu".
_ALIKE = 0.75
_SUN_PATH_BYTES = 108
"""unix(7)."""


class Prepare(JobPre):
    """A kernel build inside the first test would count against that test's time limit."""

    name = "paprscm-prepare"
    description = "Guest kernel, userland and QEMU, before the first test"

    def pre(self, job: Job) -> None:
        """Run `paprscm image`; a job that cannot have its guests fails at once.

        In a process of its own, for the reason that paprscm/plugins/classes.py gives.
        """
        facts = read_facts(job)
        tests = [test for suite in job.test_suites for test in suite.tests]
        ours = [facts[test.uri] for test in tests if test.uri in facts and facts[test.uri].ours]
        if not ours:
            return
        _check_socket_path()
        join_run()
        # The end of a terminal is a ^C, also for Avocado; but nohup(1) has it ignored.
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, signal.default_int_handler)
        given = dict(job.config.get("run.test_parameters") or [])
        asked_for = {name for known in facts.values() for name in known.parameters}
        _check_names(given, asked_for)
        options = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in given.items()
            if name in settings.names()
        ]
        guests = sum(known.needs_guest for known in ours)
        less = ["--no-snapshot"] if guests < _WORTH_A_SNAPSHOT else []
        status = _image(*(less if guests else ["--only-qemu"]), *options)
        if status == CAPABILITY_STATUS and guests < len(ours):
            # Its tests with guests end as CANCEL, each with the reason; the others can run.
            status = _image("--only-qemu", *options)
        if status:
            raise JobError("there can be no guests; no test was started")


def _check_socket_path() -> None:
    """Raise JobError if Avocado cannot listen for its tests: it would wait for them for ever."""
    # runner_nrunner.py: a folder of tempfile's, and this file in it; sun_path has 108 bytes.
    path = Path(tempfile.gettempdir()) / "avocado_12345678" / ".status_server.sock"
    if len(os.fsencode(path)) > _SUN_PATH_BYTES - 1:
        raise JobError(
            f"TMPDIR={path.parent.parent} is too long for Avocado's socket; "
            "set TMPDIR to a shorter path"
        )


def _image(*options: str) -> int:
    command = [sys.executable, "-m", "paprscm.commands.cli", "image", "--quiet", *options]
    return subprocess.run(command, check=False).returncode


def _check_names(given: Collection[str], asked_for: Collection[str]) -> None:
    """Refuse `-p NAME=VALUE` whose name is a slip of the pen; mention one that no test asks for.

    A test may ask for a name that it computes, so a name that is unlike all others is not an error.
    """
    known = sorted({*settings.names(), *asked_for})
    for name in given:
        if name in known:
            continue
        if close := difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE):
            raise JobError(
                f"-p {name}=: there is no setting '{name}', and no test of this job asks for it "
                f"(did you mean {close[0]}?); no test was started"
            )
        LOG_UI.warning("-p %s=: it is not a setting, and no test of this job asks for it", name)
