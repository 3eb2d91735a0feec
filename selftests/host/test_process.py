# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs die with any process of the run, and only their own exit counts as a result."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from paprscm.errors import HostError, KilledError
from paprscm.host import keeper, process
from paprscm.host.process import Process, join_run, run

# A stand-in for shell -> avocado -> runner -> test: each level is a process in the same group. The
# first one only starts the run.
RUN = """
import os, subprocess, sys, time
from pathlib import Path
from paprscm.host.process import Process, join_run
level = int(sys.argv[1])
print(f"level{level} {os.getpid()}", flush=True)
if level < 3:
    join_run()
if level:
    # Popen.wait() only: a parent must not react to the death of its child.
    subprocess.Popen([sys.executable, __file__, str(level - 1), sys.argv[2]]).wait()
else:
    process = Process(["sh", "-c", "sleep 1000 & exec sleep 1001"], scratch=Path(sys.argv[2]))
    keeper = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1]
    print(f"program {process.pid}", flush=True)
    print(f"keeper {keeper}", flush=True)
    process.wait()
    time.sleep(1000)
"""

# A runner that is killed by its test, which then starts a program.
KILLED_RUNNER = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from paprscm.errors import HostError
from paprscm.host.process import Process

def test():
    runner = os.getppid()
    os.kill(runner, signal.SIGKILL)
    while os.getppid() == runner:
        time.sleep(0.01)
    text = "it started"
    try:
        Process(["true"]).wait()
    except HostError as error:
        text = str(error)
    part = Path(sys.argv[1] + ".part")
    part.write_text(text)
    part.rename(sys.argv[1])

multiprocessing.get_context("fork").Process(target=test).start()
time.sleep(100)
"""

# include/uapi/linux/{filter,seccomp,prctl}.h
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
SECCOMP_ERRNO, SECCOMP_ALLOW = 0x00050000, 0x7FFF0000
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_NO_NEW_PRIVS = 22, 2, 38
PIDFD_OPEN = 434  # On every architecture.


def refuse_pidfd_open(number: int) -> None:
    """Make pidfd_open(2) fail with an errno, by a seccomp filter of this process."""
    rows = (
        (LOAD, 0, 0, 0),  # seccomp_data.nr
        (JUMP_IF_EQUAL, 0, 1, PIDFD_OPEN),
        (RETURN, 0, 0, SECCOMP_ERRNO | number),
        (RETURN, 0, 0, SECCOMP_ALLOW),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in rows))
    program = struct.pack("@HP", len(rows), ctypes.addressof(code))
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) == 0


class Run(NamedTuple):
    """The stand-in: its first process, all pids by name, the program with its child."""

    first: subprocess.Popen[str]
    pids: dict[str, int]
    started: list[int]
    scratch: Path


@pytest.fixture(params=[0, errno.EPERM, errno.ENOSYS], ids=["pidfds", "EPERM", "ENOSYS"])
def stand_in(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    """The running stand-in, also with a refused pidfd_open(2)."""
    number = request.param
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "backing").write_text("x")
    script = tmp_path / "run.py"
    script.write_text(RUN)
    first = subprocess.Popen(
        [sys.executable, str(script), "3", str(scratch)],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
        preexec_fn=(lambda: refuse_pidfd_open(number)) if number else None,
    )
    try:
        assert first.stdout is not None
        words = [first.stdout.readline().split() for _ in range(6)]
        pids = {name: int(pid) for name, pid in words}
        deadline = time.monotonic() + 5
        while len(started := members_of_group(pids["program"])) < 2:
            assert time.monotonic() < deadline, "the program and its background child"
            time.sleep(0.01)
        yield Run(first, pids, started, scratch)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()


def wait_gone(pids: list[int], limit_s: float = 2.0) -> list[int]:
    """Pids that are still alive after `limit_s`."""
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
    """Pids of the living processes of a process group."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            pids.append(int(stat.parent.name))
    return pids


@pytest.mark.parametrize("victim", ["level2", "level1", "level0", "keeper", "program"])
def test_nothing_outlives_a_killed_process_of_the_run(stand_in: Run, victim: str) -> None:
    pids, started = stand_in.pids, stand_in.started
    os.kill(pids[victim], signal.SIGKILL)
    alone = victim == "keeper"
    # After the keeper's death the kernel kills only the program, not its children.
    assert wait_gone([pids["program"]] if alone else started) == []
    if victim.startswith("level"):
        assert wait_gone([pids["keeper"]]) == []
        assert not stand_in.scratch.exists()
    if alone:
        os.killpg(pids["program"], signal.SIGKILL)


def test_a_process_that_only_started_the_run_may_end(stand_in: Run) -> None:
    """Such as a shell, or a wrapper of a CI: an ancestor in the same process group."""
    stand_in.first.kill()
    stand_in.first.wait()
    # 0.5 s is enough: the keeper polls ten times a second, or waits on a pidfd.
    assert wait_gone(stand_in.started, 0.5) == stand_in.started
    assert stand_in.scratch.exists()
    os.kill(stand_in.pids["level2"], signal.SIGKILL)
    assert wait_gone([*stand_in.started, stand_in.pids["keeper"]]) == []
    assert not stand_in.scratch.exists()


def test_nothing_starts_when_the_run_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if its pid is in use again: here it is the pid of this process."""
    own = keeper.start_time(os.getpid())
    monkeypatch.setenv("PAPRSCM_RUN", f"{os.getpid()}:{own}")
    assert Process(["true"]).wait() == 0
    monkeypatch.setenv("PAPRSCM_RUN", f"{os.getpid()}:{int(own) - 1}")
    with pytest.raises(HostError) as caught:
        Process(["true"])
    message = f"cannot start true: process {os.getpid()} of this run has ended"
    assert caught.value.message == message
    assert caught.value.hint == "if it belonged to another run, unset PAPRSCM_RUN"


@pytest.mark.parametrize("value", ["1", "make", "1:2:3", "1:2 x"])
def test_a_foreign_value_of_the_variable_is_an_error(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("PAPRSCM_RUN", value)
    with pytest.raises(HostError, match=f"PAPRSCM_RUN is '{value}', not PID:START"):
        Process(["true"])


def test_a_process_joins_a_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAPRSCM_RUN", "1:2")
    for _ in range(2):
        join_run()
    assert os.environ["PAPRSCM_RUN"] == f"1:2 {os.getpid()}:{keeper.start_time(os.getpid())}"


def test_nothing_starts_in_a_test_whose_runner_has_ended(tmp_path: Path) -> None:
    """Also if the runner was killed before the test started its first program."""
    output = tmp_path / "said"
    runner = subprocess.Popen([sys.executable, "-c", KILLED_RUNNER, output])
    assert runner.wait(10) == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while not output.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert output.read_text().startswith(f"cannot start true: process {runner.pid} of this run has")


def test_the_start_time_of_a_process_that_has_ended_is_empty() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert keeper.start_time(process.pid) == "", "a zombie has ended"
    process.wait()
    assert keeper.start_time(process.pid) == ""


def test_kill_takes_grandchildren_with_it() -> None:
    process = Process(["sh", "-c", "setsid sleep 1000 & sleep 1000"], stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 5
    while len(pids := children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(pids) == 2
    assert process.kill() == -signal.SIGKILL
    assert wait_gone([int(pid) for pid in pids], 0) == []


def test_an_interrupt_during_the_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """^C between the keeper's start and its report must also end the program."""
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


OWN = ("SEGV", "ABRT", "BUS", "ILL", "FPE", "TRAP", "SYS")


@pytest.mark.parametrize("name", [*OWN, "KILL", "TERM", "HUP", "INT", "QUIT", "USR1", "ALRM"])
def test_only_signals_of_the_program_itself_are_its_result(name: str) -> None:
    process = Process(["sh", "-c", f"kill -{name} $$"])
    number = signal.Signals[f"SIG{name}"]
    if name in OWN:
        assert process.wait() == -number
        assert process.kill() == -number
        return
    message = rf"^sh \(process {process.pid}\) was killed by SIG{name} from outside"
    with pytest.raises(KilledError, match=message):
        process.wait()
    # A caller that has caught the error gets it again.
    with pytest.raises(KilledError, match=message):
        process.kill()


def test_our_own_kill_is_not_from_outside() -> None:
    assert Process(["sleep", "1000"]).kill() == -signal.SIGKILL
    process = Process(["sleep", "1000"])
    process.send_signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM


def test_the_death_of_the_keeper_is_named() -> None:
    process = Process(["sleep", "1000"])
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
    message = (
        rf"the keeper of sleep \(process {process.pid}\) was killed from outside: the OOM killer"
    )
    with pytest.raises(KilledError, match=message):
        process.wait()


def test_a_terminated_qemu_is_detected_by_its_message(tmp_path: Path) -> None:
    """QEMU catches the signal and exits with status 0 (system/runstate.c, qemu_kill_report())."""
    output = tmp_path / "output"
    line = "qemu-system-ppc64: terminating on signal 15 from pid 5136 (/usr/bin/bash)"
    for status, text in ((1, line), (0, "all is well")):
        output.write_text(f"{text}\n")
        assert Process(["sh", "-c", f"exit {status}"], output_file=output).wait() == status
    output.write_text(f"warning: x\n{line}\n")
    message = r"was ended from outside by signal 15 from pid 5136 \(/usr/bin/bash\)"
    with pytest.raises(KilledError, match=message):
        Process(["env", "A=1", "sh", "-c", "exit 0"], output_file=output).wait()


def test_wait_gives_up_in_time() -> None:
    process = Process(["sleep", "1000"])
    assert process.wait(0.05) is None
    process.kill()


def test_a_program_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(HostError, match="cannot start nonexistent: No such file or directory"):
        Process(["nonexistent"])


def test_failure_shows_command_status_and_output() -> None:
    with pytest.raises(HostError) as caught:
        run(["sh", "-c", "echo first; echo 'went wrong' >&2; exit 3"])
    message = str(caught.value)
    assert "exit status 3" in message
    assert "went wrong" in message
    assert "sh -c" in message


def test_time_limit_kills() -> None:
    # Long enough for the start of a shell on a busy machine.
    with pytest.raises(HostError, match=r"took more than 3 s(?s:.*)begun"):
        run(["sh", "-c", "echo begun; sleep 1000"], timeout_s=3)


def test_lines_come_whole_and_to_the_log(tmp_path: Path) -> None:
    lines: list[str] = []
    done = run(
        ["sh", "-c", "printf 'a\\nb'; sleep 0.05; printf 'c\\n\\nlast'"],
        on_line=lines.append,
        log_file=tmp_path / "log",
    )
    assert lines == list(done.lines) == ["a", "bc", "", "last"]
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


def test_concurrent_task() -> None:
    with process.run_in_background(lambda _: 7) as task:
        assert task.result() == 7
        task.check()


def test_failure_of_a_task_ends_the_other() -> None:
    def fail(_: Callable[[], None]) -> None:
        raise HostError("no packages")

    with pytest.raises(HostError, match="no packages"), process.run_in_background(fail) as task:
        run(["sleep", "1000"], idle_s=0.05, on_idle=task.check)


def test_task_is_stopped_if_the_other_fails() -> None:
    ended: list[BaseException] = []

    def sleep(proceed: Callable[[], None]) -> None:
        try:
            run(["sleep", "1000"], idle_s=0.05, on_idle=proceed)
        except BaseException as error:
            ended.append(error)
            raise

    with pytest.raises(HostError, match="no kernel"), process.run_in_background(sleep):
        raise HostError("no kernel")
    assert isinstance(ended[0], process.StoppedError)


@pytest.mark.parametrize("full", [False, True])
def test_no_space_behind_a_sparse_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """SIGBUS is a result of the program, except with a full scratch folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    free = 4096 if full else 1 << 30
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    ended = Process(["sh", "-c", "kill -BUS $$"], scratch=scratch)
    if full:
        with pytest.raises(KilledError, match=f"no space left in {tmp_path}") as caught:
            ended.wait()
        assert "scratch_dir" in str(caught.value.hint)
    else:
        assert ended.wait() == -signal.SIGBUS
