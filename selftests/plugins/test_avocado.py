# SPDX-License-Identifier: GPL-2.0-or-later
"""The suite under Avocado: configuration, tags, and the status for each kind of error."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from altered_qemu import altered_qemu

from paprscm.guest.environment import Environment
from paprscm.paths import ROOT
from paprscm.results.record import Test, read_record

# The line of the first test that has ended.
STARTED = re.compile(r"^\( *1/", re.MULTILINE)
AVOCADO = str(Path(sys.executable).with_name("avocado"))

VERDICTS = '''
import os
import signal

from paprscm.errors import CapabilityError, ContractError, HostError
from paprscm.testcase import PaprScmTest


class Verdict(PaprScmTest):
    def test_pass(self):
        self.measure("answer", 42)

    def test_fail(self):
        raise ContractError("the kernel lied", hint="look")

    def test_error(self):
        raise HostError("no disk")

    def test_cancel(self):
        raise CapabilityError("no libpmem")


class Guests(PaprScmTest):
    def test_command(self):
        self.boot().succeed("echo said; exit 7")

    def test_last_words(self):
        """A kernel message after the last command in the guest."""
        guest = self.boot()
        guest.run("echo '<1>WARNING: CPU: 0 PID: 1 at last.c:1 f' > /dev/kmsg")

    def test_killed(self):
        guest = self.boot()
        os.kill(guest.process.pid, signal.SIGKILL)
        guest.run("sleep 60")

    def test_ends_with_the_test(self):
        self.measure("pid", self.boot().process.pid)
'''


KNOWN = '''
import dataclasses
import os
import signal

from paprscm.errors import GuestLostError
from paprscm.vm.machine import Machine, Nvdimm
from paprscm.testcase import QemuTest

ISSUE = "qemu-unbind-mem-aborts"
FIXED = "qemu-label-write-to-read-only-backend"


class Known(QemuTest):
    """
    :avocado: tags=device
    """

    def on(self, *version):
        self.qemu = dataclasses.replace(self.qemu, version=version)

    def test_present(self):
        self.on(99, 0, 0)
        self.known_issue(ISSUE, shows=True, found="it ended")

    def test_regression(self):
        self.on(8, 2, 1)
        self.known_issue(FIXED, shows=True, found="it ended")

    def test_gone(self):
        self.on(99, 1, 0)
        self.known_issue(ISSUE, shows=False, found="it lives")

    def test_shows_in_another_test(self):
        self.on(99, 0, 0)
        self.known_issue(ISSUE, shows=False, found="it lives")

    def test_fixed(self):
        self.on(8, 2, 1)
        self.known_issue(FIXED, shows=False, found="it lives")

    def test_before_since(self):
        self.on(6, 2, 0)
        self.known_issue(ISSUE, shows=True, found="it ended")

    def test_other_failure(self):
        self.known_issue(ISSUE, shows=True, found="it ended")
        self.fail("something else is wrong, too")

    def test_stopped_machine(self):
        vm = self.vm(Machine(memory_mib=256, nvdimms=(Nvdimm(slot=3),)))
        self.measure("pid", vm.process.pid)
        (device,) = vm.qmp.execute("query-memory-devices")
        assert (device["data"]["slot"], vm.file(3).is_file()) == (3, True)

    def test_ended_by_another(self):
        vm = self.vm(Machine(memory_mib=256))
        os.kill(vm.process.pid, signal.SIGTERM)
        while True:
            vm.qmp.execute("query-status")

    def test_killed_is_not_a_known_issue(self):
        vm = self.vm(Machine(memory_mib=256))
        os.kill(vm.process.pid, signal.SIGKILL)
        try:
            vm.qmp.execute("query-status")
        except GuestLostError as error:
            self.qemu = dataclasses.replace(self.qemu, version=(7, 2, 0))
            self.known_issue(ISSUE, shows=True, found=str(error))

    def test_crashes(self):
        vm = self.vm(Machine(memory_mib=256))
        os.kill(vm.process.pid, signal.SIGSEGV)
        vm.qmp.execute("query-status")
'''


def avocado(*words: str, cwd: Path = ROOT) -> str:
    """Run Avocado; return its output, and ignore its exit status."""
    done = subprocess.run(
        [AVOCADO, *words], cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )
    return done.stdout + done.stderr


def run_module(module: Path, *words: str) -> tuple[dict[str, dict[str, Any]], str]:
    """Run a file's tests; return Avocado's results by method name, and its output."""
    results = module.parent / "results"
    output = avocado("run", "--job-results-dir", str(results), *words, str(module))
    (job,) = results.glob("job-*/results.json")
    tests = json.loads(job.read_text())["tests"]
    return {test["id"].rpartition(".")[2]: test for test in tests}, output


def read_tests(folder: Path) -> dict[str, Test]:
    """The tests of the record that run_module() left, by method name."""
    record = read_record(folder / "results" / "latest")
    return {test.name.rpartition(".")[2]: test for test in record.tests}


def test_the_configuration_is_in_force_without_a_flag() -> None:
    output = avocado("config")
    assert "./results" in output
    # Otherwise Avocado makes a tests folder at home or, without a home, in a folder named "~".
    assert "./tests" in output
    assert any(
        line.split() == ["runner.task.interval.from_soft_to_hard_termination", "60"]
        for line in output.splitlines()
    )


def test_tests_are_found_by_tag() -> None:
    listed = avocado("list", "-t", "map_sync", "tests/").splitlines()
    lines = [
        line
        for line in listed
        if "tests/map_sync/test_map_sync.py:OneDimm.test_pmem_on_xfs" in line
    ]
    assert len(lines) == 1
    assert "No module" not in "\n".join(listed)


def test_a_job_whose_guests_cannot_start_fails_immediately() -> None:
    output = avocado("run", "-p", "kernel=/nonexistent/vmlinux", "tests/")
    assert "the kernel /nonexistent/vmlinux does not exist" in output
    assert "no test was started" in output
    assert not STARTED.search(output)


def test_a_qemu_that_cannot_run_guests_still_runs_the_other_tests(tmp_path: Path) -> None:
    (tmp_path / "known.py").write_text(KNOWN)
    (tmp_path / "verdicts.py").write_text(VERDICTS)
    wrapper = altered_qemu(tmp_path, '"virtio-rng-pci"', '"gone"')
    words = "-p", f"qemu={wrapper}", "-p", f"cache_dir={tmp_path}/cache"
    one = tmp_path / "known.py:Known.test_gone"
    tests, _ = run_module(tmp_path / "verdicts.py", *words, str(one))
    assert tests.pop("test_gone")["status"] == "PASS"
    assert {test["status"] for test in tests.values()} == {"CANCEL"}
    assert "without virtio-rng-pci" in tests["test_pass"]["fail_reason"]
    built = {path.name for path in (tmp_path / "cache").iterdir()}
    assert built <= {"locks", "qemu-facts", "durations.json"}, (
        "an artifact was built that no test needs"
    )
    output = avocado("run", *words, str(tmp_path / "verdicts.py"))
    assert "built without virtio-rng-pci" in output
    assert "no test was started" in output
    assert not STARTED.search(output)


# Names of the server itself, and of its second child, which prepares guests.
@pytest.mark.parametrize("awaited", ["fork-server", "image"])
def test_a_killed_server_is_replaced(tmp_path: Path, awaited: str) -> None:
    (tmp_path / "known.py").write_text(KNOWN)
    test = f"{tmp_path}/known.py:Known.test_gone"
    words = "run", "--job-results-dir", str(tmp_path / "results"), test
    with subprocess.Popen([AVOCADO, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        while not (servers := children.read_text().split()):
            assert run.poll() is None
        (server,) = servers
        while awaited not in names_below(server):
            assert run.poll() is None
        os.kill(int(server), signal.SIGKILL)
        assert run.stdout is not None
        assert "PASS 1" in run.stdout.read()
    assert run.returncode == 0


def names_below(server: str) -> set[str]:
    """Names of a server and of its children."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    names = set()
    for pid in (server, *children):
        with contextlib.suppress(OSError):
            names.add(Path(f"/proc/{pid}/comm").read_text().strip())
    return names


def test_a_temporary_folder_that_is_too_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Avocado cannot bind its socket there, and would wait forever for its tests."""
    (tmp_path / "known.py").write_text(KNOWN)
    words = (
        "run",
        "--job-results-dir",
        str(tmp_path / "results"),
        f"{tmp_path}/known.py:Known.test_gone",
    )
    # The longest folder that fits: 107 bytes with Avocado's suffix.
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="x"))
    try:
        fits = folder / (
            "y" * (107 - len("/avocado_12345678/.status_server.sock") - len(str(folder)) - 1)
        )
        longer = Path(f"{fits}y")
        fits.mkdir()
        longer.mkdir()
        monkeypatch.setenv("TMPDIR", str(fits))
        assert "PASS 1" in avocado(*words)
        monkeypatch.setenv("TMPDIR", str(longer))
        output = avocado(*words)
        assert "is too long for Avocado's socket; set TMPDIR" in output
    finally:
        shutil.rmtree(folder)


def test_a_job_of_other_tests_in_the_same_venv_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "# Not paprscm.testcase, which only a comment names.\n"
        "from avocado import Test\nclass A(Test):\n    def test(self):\n        pass\n"
    )
    # For other tests, our settings and their misspellings are just parameters.
    given = ("-p", "kernel=/nonexistent", "-p", "qemu=/nonexistent", "-p", "sead=7")
    output = avocado("run", *given, "test_other.py", cwd=tmp_path)
    assert "PASS 1" in output


def test_a_known_issue_is_judged_by_the_version_and_updates_are_printed(tmp_path: Path) -> None:
    """Tests of QEMU alone do not need a kernel, so a missing one is not an error."""
    module = tmp_path / "known.py"
    module.write_text(KNOWN)
    tests, output = run_module(module, "-p", "kernel=/nonexistent")
    assert {name: test["status"] for name, test in tests.items()} == {
        "test_present": "WARN",
        "test_regression": "FAIL",
        "test_gone": "PASS",
        "test_shows_in_another_test": "PASS",
        "test_fixed": "PASS",
        "test_before_since": "WARN",
        "test_other_failure": "FAIL",
        "test_stopped_machine": "PASS",
        "test_ended_by_another": "ERROR",
        "test_killed_is_not_a_known_issue": "ERROR",
        "test_crashes": "FAIL",
    }
    for name, reason in (
        ("test_ended_by_another", "was ended from outside by signal 15 from pid "),
        ("test_killed_is_not_a_known_issue", "was killed by SIGKILL from outside: the OOM killer"),
    ):
        assert reason in tests[name]["fail_reason"]
    assert tests["test_present"]["fail_reason"] == "known issue qemu-unbind-mem-aborts: it ended"
    assert "it as fixed in 8.2" in tests["test_regression"]["fail_reason"]
    assert "something else" in tests["test_other_failure"]["fail_reason"]
    recorded = read_tests(tmp_path)
    assert {name: test.status for name, test in recorded.items()} == {
        name: test["status"] for name, test in tests.items()
    }
    pid = recorded["test_stopped_machine"].facts["pid"]
    assert not Path(f"/proc/{pid}").exists()
    # At the end of the job, after the results, and in the record.
    lines = output[output.index("RESULTS ") :].splitlines()
    updates = [line.partition(": ")[2] for line in lines if line.startswith("UPDATE")]
    file = "known_issues/qemu-unbind-mem-aborts.md"
    assert updates == [
        "known issue qemu-unbind-mem-aborts no longer shows on QEMU 99.1.0: if it is fixed there, "
        f"update 'Fixed in' of {file}",
        f"known issue qemu-unbind-mem-aborts shows on QEMU 6.2.0: update 'Since' of {file}",
    ]
    (finding,) = recorded["test_gone"].known_issues
    assert (finding.product, finding.version, finding.shows) == ("QEMU", "99.1.0", False)
    assert finding.update == updates[0]


OWN_PARAMETERS = """
from bases import Base


class Own(Base):
    def test_own(self):
        self.measure("cats", self.params.get("cats"))
        self.measure("computed", self.params.get("ku" + "mquat"))
"""

# Only the base class imports the suite, and it is in another file.
BASES = """
from paprscm.testcase import QemuTest


class Base(QemuTest):
    pass
"""


def test_a_test_s_own_parameter_needs_no_registration(tmp_path: Path) -> None:
    (tmp_path / "bases.py").write_text(BASES)
    module = tmp_path / "own.py"
    module.write_text(OWN_PARAMETERS)
    tests, _ = run_module(module, "-p", "cats=9", "-p", "seed=7", "-p", "kumquat=1")
    assert tests["test_own"]["status"] == "PASS"
    figures = read_tests(tmp_path)["test_own"].facts
    assert (figures["cats"], figures["computed"]) == ("9", "1")


@pytest.mark.parametrize(
    ("parameter", "meant"),
    [("sead=7", "seed"), ("catz=9", "cats"), ("memory=512", "memory_mib")],
)
def test_a_misspelled_parameter_is_refused(tmp_path: Path, parameter: str, meant: str) -> None:
    (tmp_path / "bases.py").write_text(BASES)
    (tmp_path / "own.py").write_text(OWN_PARAMETERS)
    output = avocado("run", "-p", parameter, str(tmp_path / "own.py"))
    assert f"did you mean {meant}?" in output
    assert "no test was started" in output
    assert not STARTED.search(output)


def test_an_unused_parameter_is_mentioned(tmp_path: Path) -> None:
    (tmp_path / "known.py").write_text(KNOWN)
    output = avocado("run", "-p", "kumquat=1", f"{tmp_path}/known.py:Known.test_gone")
    assert "-p kumquat=: it is not a setting, and no test of this job reads it" in output
    assert "PASS 1" in output


def test_a_job_with_guests_needs_its_kernel(tmp_path: Path) -> None:
    (tmp_path / "known.py").write_text(KNOWN)
    (tmp_path / "verdicts.py").write_text(VERDICTS)
    words = "run", "-p", "kernel=/nonexistent", str(tmp_path / "known.py")
    assert "no test was started" in avocado(*words, str(tmp_path / "verdicts.py"))


def test_the_class_and_not_a_tag_decides_about_a_guest(tmp_path: Path) -> None:
    tagged = VERDICTS.replace("(PaprScmTest):", '(PaprScmTest):\n    """:avocado: tags=device"""')
    (tmp_path / "tagged.py").write_text(tagged)
    output = avocado("run", "-p", "kernel=/nonexistent", str(tmp_path / "tagged.py"))
    assert "no test was started" in output


@pytest.mark.guest
def test_the_kind_of_error_decides_the_status(environment: Environment, tmp_path: Path) -> None:
    del environment  # Made before the job's time limit starts.
    module = tmp_path / "verdicts.py"
    module.write_text(VERDICTS)
    tests, _ = run_module(module)
    assert {name: test["status"] for name, test in tests.items()} == {
        "test_pass": "PASS",
        "test_fail": "FAIL",
        "test_error": "ERROR",
        "test_cancel": "CANCEL",
        "test_command": "FAIL",
        "test_last_words": "FAIL",
        "test_killed": "ERROR",
        "test_ends_with_the_test": "PASS",
    }
    assert "the kernel lied (look)" in tests["test_fail"]["fail_reason"]
    assert "status 7" in tests["test_command"]["fail_reason"]
    assert "said" in tests["test_command"]["fail_reason"]
    assert "last.c:1" in tests["test_last_words"]["fail_reason"]
    assert "was killed by SIGKILL from outside" in tests["test_killed"]["fail_reason"]
    record = read_record(tmp_path / "results" / "latest")
    recorded = read_tests(tmp_path)
    assert recorded["test_pass"].facts["answer"] == 42
    ran_on = record.environment(recorded["test_pass"])
    assert ran_on is not None
    assert ran_on.kernel is not None
    assert ran_on.kernel.page_size_bytes == 65536
    assert recorded["test_last_words"].contract.startswith("A kernel message after the last")
    failed = recorded["test_fail"]
    assert (failed.reason, failed.hint) == ("the kernel lied", "look")
    pid = recorded["test_ends_with_the_test"].facts["pid"]
    assert not Path(f"/proc/{pid}").exists()
    folder = Path(tests["test_command"]["logdir"])
    logs = {path.name for path in (folder / "data" / "guest").iterdir()}
    assert {"console.log", "qemu.log", "qemu.sh"} <= logs
    assert "echo said; exit 7" in (folder / "debug.log").read_text()
