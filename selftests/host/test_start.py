# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that starts a run may end; the run continues, unless its terminal closes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import tempfile
import termios
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from marked import MARK, marked

from paprscm.paths import ROOT

LIMIT_S = 120.0

# Reports that its QEMU runs, and waits for permission to end.
TEST = """
from pathlib import Path

from paprscm.vm.machine import Machine, Nvdimm
from paprscm.testcase import QemuTest

HERE = Path(__file__).parent


class Waits(QemuTest):
    '''
    :avocado: tags=device
    '''

    def test(self):
        vm = self.vm(Machine(memory_mib=256, nvdimms=(Nvdimm(),)))
        with (HERE / "ready").open("w") as ready:
            print(vm.process.pid, file=ready)
        (HERE / "go").open().readline()
        self.assertIsNone(vm.process.wait(0.5))
        vm.qmp.execute("query-status")
"""


class Start:
    """A shell that starts a run of one test; after the constructor its QEMU runs.

    Args:
        folder: for all files of the run.
        script: shell script; $RUN is the run, and `read` waits for end_shell().
        terminal: the shell has a terminal, and is its session leader.
    """

    def __init__(self, folder: Path, script: str, *, terminal: bool) -> None:
        (folder / "waits.py").write_text(TEST)
        self.log, self.scratch = folder / "log", folder / "scratch"
        self.scratch.mkdir()
        self.results = folder / "results"
        self._stack = contextlib.ExitStack()
        # For Avocado's socket: the paths of pytest's folders may be too long.
        self.temporary = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._ready, self._go, self._end = (self._fifo(folder / n) for n in ("ready", "go", "end"))
        options = f"-p scratch_dir={self.scratch} --job-results-dir {self.results}"
        run = f"make --no-print-directory suite 'ARGS={options}' TESTS={folder}/waits.py"
        script = script.replace("$RUN", run).replace("read", f"read line < {folder}/end")
        self._hang_up = self._stack.enter_context(contextlib.ExitStack())
        slave = os.open(os.devnull, os.O_RDWR)
        if terminal:
            os.close(slave)
            master, slave = os.openpty()
            self._hang_up.callback(os.close, master)
        # make and avocado inherit it, also if their parent ends.
        self._run, theirs = os.pipe()
        self._stack.callback(os.close, self._run)
        mark = uuid.uuid4().hex

        def begin() -> None:
            # nohup, for example, makes all its descendants ignore it.
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            if terminal:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.shell = subprocess.Popen(
            ["sh", "-c", script],
            cwd=ROOT,
            env={**os.environ, MARK: mark, "TMPDIR": str(self.temporary), "LOG": str(self.log)},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            pass_fds=[theirs],
            start_new_session=True,
            preexec_fn=begin,
        )
        self._stack.callback(self._kill_all, mark)
        os.close(theirs)
        os.close(slave)
        try:
            self._wait(self._ready, self._run)
        except BaseException:
            self.close()
            raise
        qemu = os.read(self._ready, 100).decode().strip()
        keeper = Path(f"/proc/{qemu}/stat").read_text().rpartition(")")[2].split()[1]
        self._keeper = os.pidfd_open(int(keeper))
        self._stack.callback(os.close, self._keeper)

    def close(self) -> None:
        """End all remaining processes."""
        self._stack.close()

    def end_shell(self) -> None:
        """Let the shell end by itself, and close its terminal."""
        os.write(self._end, b"\n")
        self.shell.wait(LIMIT_S)
        self.close_terminal()

    def close_terminal(self) -> None:
        """Hang up."""
        self._hang_up.close()

    def finish(self) -> dict[str, str]:
        """Let the test end; return its result."""
        os.write(self._go, b"\n")
        self.wait()
        return self.test()

    def test(self) -> dict[str, str]:
        """Result of the test, after the run has ended."""
        (results,) = self.results.glob("job-*/results.json")
        (test,) = json.loads(results.read_text())["tests"]
        return dict(test)

    def wait(self) -> None:
        """Wait until make and avocado have ended, and QEMU and its keeper."""
        self._wait(self._run)
        self._wait(self._keeper)

    def _fifo(self, path: Path) -> int:
        os.mkfifo(path)
        # O_RDWR: neither end waits for the other one to be opened.
        handle = os.open(path, os.O_RDWR)
        self._stack.callback(os.close, handle)
        return handle

    def _wait(self, handle: int, *failures: int) -> None:
        ready = handle in select.select([handle, *failures], [], [], LIMIT_S)[0]
        output = self.log.read_text(errors="replace") if self.log.exists() else "nothing"
        assert ready, f"nothing happens; the run has printed:\n{output}"

    def _kill_all(self, mark: str) -> None:
        self.shell.kill()
        self.shell.wait()
        for pid in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Start]]:
    """Start a run that ends with the test."""
    with contextlib.ExitStack() as stack:

        def start_one(script: str, *, terminal: bool) -> Start:
            return stack.enter_context(
                contextlib.closing(Start(tmp_path, script, terminal=terminal))
            )

        yield start_one


@pytest.mark.parametrize(
    ("script", "terminal"),
    [
        ("$RUN > $LOG 2>&1 & read", False),
        ("$RUN 2>&1 | cat > $LOG & read", False),
        ("nohup $RUN > $LOG 2>&1 & read", True),
        ("setsid $RUN > $LOG 2>&1 & read", True),
    ],
    ids=["shell", "pipeline", "nohup", "setsid"],
)
def test_the_process_that_started_a_run_may_end(
    start: Callable[..., Start], script: str, terminal: bool
) -> None:
    """A shell may end, and its terminal may close if the run is detached from it."""
    started = start(script, terminal=terminal)
    started.end_shell()
    test = started.finish()
    assert test["status"] == "PASS", test["fail_reason"]
    assert list(started.scratch.iterdir()) == []


@pytest.mark.parametrize("output", ["> $LOG 2>&1", ""], ids=["to a file", "to the terminal"])
def test_a_terminal_that_closes_ends_the_run(start: Callable[..., Start], output: str) -> None:
    """As with ^C, the job is interrupted, and leaves nothing behind."""
    started = start(f"$RUN {output}", terminal=True)
    started.close_terminal()
    started.wait()
    assert list(started.scratch.iterdir()) == []
    assert list(started.temporary.iterdir()) == []
    assert started.test()["status"] == "INTERRUPTED"
