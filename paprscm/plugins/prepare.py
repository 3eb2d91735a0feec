# SPDX-License-Identifier: GPL-2.0-or-later
"""Build or fetch kernel, userland and QEMU before the first test of a job."""

from __future__ import annotations

import difflib
import os
import signal
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
from paprscm.plugins import fork_server
from paprscm.plugins.classes import read_facts

# From this number of tests with guests on, a snapshot saves more time than it costs.
_WORTH_A_SNAPSHOT = 8
# "sead" and "seed", "memory" and "memory_mib"; not "cuts" and "cpu".
_ALIKE = 0.75
_SUN_PATH_BYTES = 108
"""unix(7)."""


class Prepare(JobPre):
    """Prepares guests before the first test, whose time limit does not include a kernel build."""

    name = "paprscm-prepare"
    description = "Guest kernel, userland and QEMU, before the first test"

    def pre(self, job: Job) -> None:
        """Run `paprscm image`; fail the job at once if guests are impossible.

        In a child of the fork server, for the reason given in paprscm/plugins/classes.py.
        """
        facts = read_facts(job)
        tests = [test for suite in job.test_suites for test in suite.tests]
        ours = [facts[test.uri] for test in tests if test.uri in facts and facts[test.uri].ours]
        if not ours:
            return
        _check_socket_path()
        join_run()
        # Closing the terminal interrupts Avocado like ^C, except under nohup(1).
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, signal.default_int_handler)
        parameters = dict(job.config.get("run.test_parameters") or [])
        read_names = {name for class_facts in facts.values() for name in class_facts.parameters}
        _check_names(parameters, read_names)
        chosen = {name: text for name, text in parameters.items() if name in settings.names()}
        guests = sum(class_facts.needs_guest for class_facts in ours)
        status = _image(chosen, only_qemu=not guests, no_snapshot=guests < _WORTH_A_SNAPSHOT)
        if status == CAPABILITY_STATUS and guests < len(ours):
            # Tests with guests end as CANCEL, each with the reason; the others can run.
            status = _image(chosen, only_qemu=True)
        if status != 0:
            raise JobError("guests cannot be prepared; no test was started")


def _check_socket_path() -> None:
    """Raise JobError if Avocado could not bind its socket: it would wait for its tests for ever."""
    # runner_nrunner.py: this file in a folder made by tempfile.
    path = Path(tempfile.gettempdir()) / "avocado_12345678" / ".status_server.sock"
    if len(os.fsencode(path)) > _SUN_PATH_BYTES - 1:
        raise JobError(
            f"TMPDIR={path.parent.parent} is too long for Avocado's socket; "
            "set TMPDIR to a shorter path"
        )


def _image(chosen: dict[str, str], *, only_qemu: bool, no_snapshot: bool = False) -> int | None:
    """Do what `paprscm image` does; return its status, or None if it was ended."""
    request = {"settings": chosen, "only_qemu": only_qemu, "no_snapshot": no_snapshot}
    status: int | None = fork_server.call("paprscm.commands.image:prepare_job", request).result()
    return status


def _check_names(names: Collection[str], read_names: Collection[str]) -> None:
    """Refuse `-p NAME=VALUE` with a misspelt name; warn about one that no test reads.

    A test may compute the name of a parameter, so a name unlike all known ones is not an error.
    """
    known = sorted({*settings.names(), *read_names})
    for name in names:
        if name in known:
            continue
        if close := difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE):
            raise JobError(
                f"-p {name}=: there is no setting '{name}', and no test of this job reads it "
                f"(did you mean {close[0]}?); no test was started"
            )
        LOG_UI.warning("-p %s=: it is not a setting, and no test of this job reads it", name)
