# SPDX-License-Identifier: GPL-2.0-or-later
"""Build or fetch what the guests of a job need before its first test starts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from avocado.core.exceptions import JobError
from avocado.core.job import Job
from avocado.core.nrunner.runnable import Runnable
from avocado.core.plugin_interfaces import JobPre

from paprscm.errors import CAPABILITY_STATUS
from paprscm.process import join_run
from paprscm.settings import TEST_PARAMETERS

# So many tests with guests save more time than it takes to make a snapshot.
_WORTH_A_SNAPSHOT = 8
_SUN_PATH_BYTES = 108
"""unix(7)."""


class Prepare(JobPre):
    """A kernel build inside the first test would count against that test's time limit."""

    name = "paprscm-prepare"
    description = "Guest kernel, userland and QEMU, before the first test"

    def pre(self, job: Job) -> None:
        """Run `paprscm image`; a job that cannot have its guests fails at once.

        In a process of its own: Avocado's finder of tests has put the folders of all modules that
        it looked at on the front of this one's sys.path, so that here `import qemu.qmp` would
        find our qemu.py (known_issues/avocado-safeloader-sys-path).
        """
        ours = ours_of(job)
        if not ours:
            return
        _check_socket_path()
        join_run()
        given = dict(job.config.get("run.test_parameters") or [])
        options = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in given.items()
            if name not in TEST_PARAMETERS
        ]
        guests = sum(not _needs_no_guest(test) for test in ours)
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
    command = [sys.executable, "-m", "paprscm.cli", "image", "--quiet", *options]
    return subprocess.run(command, check=False).returncode


def ours_of(job: Job) -> list[Runnable]:
    """The job's tests that are of this suite: the plugin is loaded for every job in the venv."""
    tests = [test for suite in job.test_suites for test in suite.tests]
    modules = {str(test.uri).partition(":")[0] for test in tests}
    texts = {
        module: Path(module).read_text(errors="replace")
        for module in modules
        if module.endswith(".py") and Path(module).is_file()
    }
    return [
        test
        for test in tests
        if "paprscm.testcase" in texts.get(str(test.uri).partition(":")[0], "")
    ]


def _needs_no_guest(test: Runnable) -> bool:
    """Whether it judges QEMU alone: it may then start on a machine without kernel and userland."""
    return bool({"device", "hcall"} & set(test.tags or ()))
