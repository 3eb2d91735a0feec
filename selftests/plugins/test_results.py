# SPDX-License-Identifier: GPL-2.0-or-later
"""Record, formats and output of real jobs, and running the failed tests again."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paprscm.formats.registry import FILES
from paprscm.paths import ROOT
from paprscm.results.record import FILE, Record, read_record

BIN = Path(sys.executable).parent

TESTS = '''
import os
import time

from paprscm.errors import CapabilityError, ContractError
from paprscm.testcase import QemuTest

ISSUE = "qemu-unbind-mem-aborts"


class Few(QemuTest):
    def test_a(self):
        """A promise that holds.

        And how it is checked.
        """
        self.metric("rate", 2.5, "calls/s", size=4)
        self.measure("list", [1, 2])

    def test_ab(self):
        """A promise that is broken."""
        self.check("a value", 1, 2, detail="x" * 300)

    def test_abc(self):
        self.known_issue(ISSUE, shows=True, found="QEMU ended")

    def test_abcd(self):
        self.known_issue(ISSUE, shows=True, found="QEMU ended")

    def test_b(self):
        raise CapabilityError("no libpmem", hint="qemu=debian:trixie")

    def test_c(self):
        assert 1 == 2, "\\x1b[31m\\x00"
'''


def run(folder: Path, *words: str | Path, command: str = "avocado", **env: str) -> str:
    """Run a job whose results are in `folder`, to its end; return its output."""
    done = subprocess.run(
        [BIN / command, *words],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return f"{done.stdout}status {done.returncode}"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a job with these tests."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "few.py").write_text(TESTS)
    words = "run", "--job-results-dir", folder / "results", "--max-parallel-tasks=2"
    return folder, run(folder, *words, "-p", "formats=junit,ktap", folder / "few.py")


def few(folder: Path) -> Record:
    """The record of the last job."""
    return read_record(folder / "results" / "latest")


def test_the_record_of_a_job(job: tuple[Path, str]) -> None:
    folder, output = job
    record = few(folder)
    tests = {test.name.rpartition(".")[2]: test for test in record.tests}
    statuses = {name: test.status for name, test in tests.items()}
    assert statuses == {
        **{"test_a": "PASS", "test_ab": "FAIL", "test_abc": "WARN", "test_abcd": "WARN"},
        **{"test_b": "CANCEL", "test_c": "ERROR"},
    }
    assert record.job.status == 1
    assert output.endswith("status 1")
    first = tests["test_a"]
    assert first.contract == "A promise that holds."
    assert first.name == f"{folder.name}/few.py:Few.test_a"
    (metric,) = first.metrics
    assert (metric.name, metric.value, metric.unit) == ("rate", 2.5, "calls/s")
    assert metric.dimensions == {"size": "4"}
    assert first.facts["list"] == [1, 2]
    assert first.times is not None
    assert sum(first.times.activities.values()) <= first.times.duration_s
    assert first.command.endswith("few.py:Few.test_a$'")
    assert tests["test_b"].command.endswith("few.py:Few.test_b")
    assert (tests["test_b"].reason, tests["test_b"].hint) == ("no libpmem", "qemu=debian:trixie")
    assert [issue.name for issue in tests["test_abc"].shown] == ["qemu-unbind-mem-aborts"]
    for test in record.tests:
        assert (folder / "results" / "latest" / test.logs[0]).name == "debug.log"
    # All tests have the same environment.
    (environment,) = record.environments.values()
    assert len(environment.qemu.sha256) == 64
    assert environment.kernel is None
    assert record.suite.commit is None or len(record.suite.commit) == 40


def test_the_formats_are_written_at_the_end(job: tuple[Path, str]) -> None:
    folder, _output = job
    files = {file.name for file in (folder / "results" / "latest").iterdir()}
    assert files & set(FILES.values()) == {FILES["junit"], FILES["ktap"]}
    assert FILE in files


def test_a_known_issue_takes_one_line(job: tuple[Path, str]) -> None:
    _folder, output = job
    assert output.count("qemu-unbind-mem-aborts") == 1
    assert re.search(r"^ +2x qemu-unbind-mem-aborts H_SCM_UNBIND_MEM", output, re.MULTILINE)


def test_the_output_of_a_job(job: tuple[Path, str]) -> None:
    folder, output = job
    head, *blocks = output.split("\n\n")
    assert head.count("few.py:Few.test_") == 6
    assert re.search(r"^\(\d/6\) PASS +\S+few.py:Few.test_a  \d", head, re.MULTILINE)
    failed = next(block for block in blocks if block.startswith("FAIL"))
    assert "contract   A promise that is broken." in failed
    assert "reason     a value: 1, expected 2" in failed
    assert "run again  avocado run" in failed
    assert f"log        {folder}" in failed
    # Texts are folded, paths and commands are not.
    assert all(len(line) <= 80 for line in failed.splitlines() if str(folder) not in line)
    assert "Run the 2 tests that failed again: paprscm rerun --failed " in output
    assert "RESULTS    : PASS 1 | ERROR 1 | FAIL 1 | SKIP 0 | WARN 2 | INTERRUPT 0" in output
    assert "\x1b" not in output


def test_colours_only_where_they_are_wanted(job: tuple[Path, str]) -> None:
    folder, _output = job
    latest = str(folder / "results" / "latest")
    # script(1) gives a terminal.
    command = f"{BIN}/paprscm results {latest}"
    for env, colours in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        done = subprocess.run(
            ["script", "-qec", command, "/dev/null"],
            env={**os.environ, "TERM": "xterm", **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("\x1b[1;31m" in done.stdout) == colours


def test_failed_tests_run_again(job: tuple[Path, str]) -> None:
    folder, _output = job
    latest = folder / "results" / "latest"
    again = "rerun", "--failed", latest, "--", "--job-results-dir", folder / "again"
    output = run(folder, *again, command="paprscm")
    record = read_record(folder / "again" / "latest")
    # test_ab is no prefix here, although Avocado takes it for a regular expression.
    names = {test.name.rpartition(".")[2]: test.status for test in record.tests}
    assert names == {"test_ab": "FAIL", "test_c": "ERROR"}
    assert output.endswith("status 1")
    assert record.job.parameters == few(folder).job.parameters


def test_a_misspelt_format_is_refused_before_the_first_test(job: tuple[Path, str]) -> None:
    folder, _output = job
    words = "run", "--job-results-dir", folder / "wrong", "-p", "formats=junut", folder / "few.py"
    output = run(folder, *words)
    assert "unknown format 'junut' (one of json, junit" in output
    assert "no test was started" in output
    assert "few.py:Few" not in output


SLOW = """
import time
from pathlib import Path

from paprscm.testcase import QemuTest


class Slow(QemuTest):
    def test_1(self):
        pass

    def test_2(self):
        Path(__file__).with_name("sleeping").touch()
        time.sleep(60)

    def test_3(self):
        pass
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_job_that_is_killed_or_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    words = "run", "--job-results-dir", tmp_path / "results", "--max-parallel-tasks=1"
    with subprocess.Popen(
        [BIN / "avocado", *words, tmp_path / "slow.py"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        # A background job of a shell ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as avocado:
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                files = list(tmp_path.glob(f"results/job-*/{FILE}"))
                # In the body of the test: an interrupt while its process starts is an ERROR.
                if (
                    (tmp_path / "sleeping").exists()
                    and files
                    and b'"RUNNING"' in files[0].read_bytes()
                    and b'"PASS"' in (files[0].read_bytes())
                ):
                    break
                time.sleep(0.05)
            avocado.send_signal(number)
            avocado.wait(120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(avocado.pid, signal.SIGKILL)
    record = few(tmp_path)
    assert [test.status for test in record.tests] == ["PASS", "INTERRUPTED", "INTERRUPTED"]
    assert [test.times is not None for test in record.tests] == [True, True, False]
    if number == signal.SIGKILL:
        assert record.job.end is None
        assert record.tests[1].reason == "the job was killed while this test ran"
    else:
        assert record.job.status == 8
        assert record.tests[2].reason == "not started: the job was interrupted"
