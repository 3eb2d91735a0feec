# SPDX-License-Identifier: GPL-2.0-or-later
"""A program that we start dies with us, whoever of the run is killed, and with its children."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from paprscm import process
from paprscm.errors import HostError
from paprscm.process import Process, run

# A stand-in for avocado -> runner -> test: each level is a process in the same group.
RUN = """
import os, subprocess, sys, time
from pathlib import Path
from paprscm.process import Process
level = int(sys.argv[1])
print(f"level{level} {os.getpid()}", flush=True)
if level:
    # One that is killed must not be waited for by its parent with subprocess' help.
    subprocess.Popen([sys.executable, __file__, str(level - 1), sys.argv[2]]).wait()
else:
    process = Process(["sh", "-c", "sleep 1000 & exec sleep 1001"], scratch=Path(sys.argv[2]))
    keeper = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1]
    print(f"program {process.pid}", flush=True)
    print(f"keeper {keeper}", flush=True)
    process.wait()
    time.sleep(1000)
"""


def wait_gone(pids: list[int], limit_s: float = 2.0) -> list[int]:
    """Those that still live after `limit_s`."""
    deadline = time.monotonic() + limit_s
    handles = {}
    for pid in pids:
        try:
            handles[os.pidfd_open(pid)] = pid
        except ProcessLookupError:
            continue
    while handles and (left := deadline - time.monotonic()) > 0:
        for ready in select.select(list(handles), [], [], left)[0]:
            del handles[ready]
            os.close(ready)
    return list(handles.values())


def members_of_group(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("victim", ["level2", "level1", "level0", "keeper", "program"])
def test_nothing_outlives_a_killed_process_of_the_run(tmp_path: Path, victim: str) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "backing").write_text("x")
    program = tmp_path / "run.py"
    program.write_text(RUN)
    first = subprocess.Popen(
        [sys.executable, str(program), "2", str(scratch)],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        assert first.stdout is not None
        pids = dict(first.stdout.readline().split() for _ in range(5))
        deadline = time.monotonic() + 5
        while len(started := members_of_group(int(pids["program"]))) < 2:
            assert time.monotonic() < deadline, "the program and its background child"
            time.sleep(0.01)
        os.kill(int(pids[victim]), signal.SIGKILL)
        alone = victim == "keeper"
        # Of a killed keeper's program the kernel kills only the program itself.
        assert wait_gone([int(pids["program"])] if alone else started) == []
        if victim.startswith("level"):
            assert wait_gone([int(pids["keeper"])]) == []
            assert not scratch.exists()
        if alone:
            os.killpg(int(pids["program"]), signal.SIGKILL)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()


def test_kill_takes_grandchildren_with_it() -> None:
    process = Process(["sh", "-c", "setsid sleep 1000 & sleep 1000"], stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 5
    while len(pids := children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(pids) == 2
    assert process.kill() == -signal.SIGKILL
    assert wait_gone([int(pid) for pid in pids], 0) == []


def test_an_interrupt_while_it_starts_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """^C between the keeper's start and its report; the build folder was still written to then."""
    note = tmp_path / "pid"

    def interrupted(_self: Process, _timeout_s: float | None) -> None:
        deadline = time.monotonic() + 10
        while not (note.exists() and note.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(Process, "_next_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Process(["sh", "-c", f"echo $$ > {note}; exec sleep 1000"])
    assert wait_gone([int(note.read_text())], 0) == []


def test_exit_status_is_passed_on() -> None:
    assert Process(["sh", "-c", "exit 7"]).wait() == 7
    assert Process(["sh", "-c", "kill -SEGV $$"]).wait() == -signal.SIGSEGV


def test_wait_gives_up_in_time() -> None:
    process = Process(["sleep", "1000"])
    assert process.wait(0.05) is None
    process.kill()


def test_a_program_that_does_not_exist_is_one_sentence() -> None:
    with pytest.raises(HostError, match="cannot start nonexistent: No such file or directory"):
        Process(["nonexistent"])


def test_failure_shows_command_status_and_output() -> None:
    with pytest.raises(HostError) as caught:
        run(["sh", "-c", "echo first; echo 'went wrong' >&2; exit 3"])
    said = str(caught.value)
    assert "exit status 3" in said
    assert "went wrong" in said
    assert "sh -c" in said


def test_time_limit_kills() -> None:
    # Long enough for a shell to begin on a busy machine.
    with pytest.raises(HostError, match=r"took more than 3 s(?s:.*)begun"):
        run(["sh", "-c", "echo begun; sleep 1000"], timeout_s=3)


def test_lines_come_whole_and_to_the_log(tmp_path: Path) -> None:
    seen: list[str] = []
    done = run(
        ["sh", "-c", "printf 'a\\nb'; sleep 0.05; printf 'c\\n\\nlast'"],
        on_line=seen.append,
        log_file=tmp_path / "log",
    )
    assert seen == list(done.lines) == ["a", "bc", "", "last"]
    assert (tmp_path / "log").read_bytes() == b"a\nbc\n\nlast"


def test_descriptors_are_passed_and_no_others() -> None:
    read_end, write_end = os.pipe()
    other = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(other, True)
    script = f"echo passed > /proc/self/fd/{write_end}; test ! -e /proc/self/fd/{other}"
    process = Process(["sh", "-c", script], pass_fds=[write_end])
    os.close(write_end)
    assert os.read(read_end, 100) == b"passed\n"
    assert process.wait() == 0
    assert os.read(read_end, 1) == b"", "the keeper or our process still holds the other end"
    os.close(read_end)
    os.close(other)


def test_task_beside_another() -> None:
    with process.beside(lambda _: 7) as task:
        assert task.result() == 7
        task.check()


def test_failure_of_a_task_ends_what_runs_beside_it() -> None:
    def fail(_: Callable[[], None]) -> None:
        raise HostError("no packages")

    with pytest.raises(HostError, match="no packages"), process.beside(fail) as task:
        run(["sleep", "1000"], idle_s=0.05, on_idle=task.check)


def test_task_is_stopped_where_the_other_fails() -> None:
    ended: list[BaseException] = []

    def sleep(proceed: Callable[[], None]) -> None:
        try:
            run(["sleep", "1000"], idle_s=0.05, on_idle=proceed)
        except BaseException as error:
            ended.append(error)
            raise

    with pytest.raises(HostError, match="no kernel"), process.beside(sleep):
        raise HostError("no kernel")
    assert isinstance(ended[0], process.StoppedError)
