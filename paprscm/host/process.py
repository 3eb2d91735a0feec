# SPDX-License-Identifier: GPL-2.0-or-later
"""Start programs that cannot outlive the run, however it ends (see keeper.py)."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from paprscm import log
from paprscm.errors import HostError, KilledError
from paprscm.host import keeper, oom

_KEEPER = Path(keeper.__file__)
# A killed process may first have to finish an fdatasync, which takes seconds on a busy disk.
_KILL_LIMIT_S = 60.0
_FULL_BYTES = 1 << 20

T = TypeVar("T")

# PID:START of each process of the run (see keeper.start_time), separated by spaces. The Makefile
# sets the first, that of make.
_RUN = "PAPRSCM_RUN"

# Signals that a program raises itself; any other signal comes from outside.
_OWN_SIGNALS = {
    *(signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL),
    *(signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS, signal.SIGPIPE),
}

# QEMU catches SIGINT, SIGHUP and SIGTERM, prints this and exits with status 0.
_TERMINATED = re.compile(r"terminating on (signal \d+(?: from pid \d+ \(.*\))?)")


def join_run() -> None:
    """Make this process a member of the run: the programs of the run end with it.

    Processes that it starts from now on read the members from their environment.
    """
    own = f"{os.getpid()}:{keeper.start_time(os.getpid())}"
    os.environ[_RUN] = " ".join(dict.fromkeys([*os.environ.get(_RUN, "").split(), own]))


def _run_members() -> list[tuple[int, str]]:
    """Members of the run, which must stay alive: process id and start time.

    Raises:
        HostError: PAPRSCM_RUN is malformed; the Makefile and join_run() write it.
    """
    words = os.environ.get(_RUN, "").split()
    if not all(re.fullmatch(r"\d+:\d+", word) for word in words):
        raise HostError(f"{_RUN} is {os.environ[_RUN]!r}, not PID:START …", hint=f"unset {_RUN}")
    members = [(int(pid), start) for pid, start in (word.split(":") for word in words)]
    members.append((os.getpid(), keeper.start_time(os.getpid())))
    # Avocado runs a test in a child of its runner, forked by multiprocessing.
    runner = multiprocessing.parent_process()
    if runner is not None and runner.pid is not None:
        # After its end we have another parent, and its process id may be reused.
        alive = runner.pid == os.getppid()
        members.append((runner.pid, keeper.start_time(runner.pid) if alive else ""))
    return members


def _name(argv: Sequence[str]) -> str:
    """Name of the program that a command line starts, directly or through env(1)."""
    names = (Path(word).name for word in argv if "=" not in word)
    return next((name for name in names if name != "env"), argv[0])


def describe_status(status: int) -> str:
    """Description of an exit status: "exit status 1", "killed by SIGSEGV"."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


class Process:
    """One running program, in a process group of its own; it cannot outlive this run.

    Args:
        argv: the command line.
        cwd: working directory.
        env: its complete environment; None: ours.
        stdin, stdout, stderr: as for subprocess.Popen; a file descriptor or a subprocess constant.
        pass_fds: descriptors that it inherits under the same numbers.
        scratch: folder to remove if this process dies before it can do so.
        output_file: output of a QEMU, which names there the signal that ended it.

    Raises:
        HostError: the program cannot be started.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
        stderr: int | None = None,
        pass_fds: Sequence[int] = (),
        scratch: Path | None = None,
        output_file: Path | None = None,
    ) -> None:
        self.argv = [str(word) for word in argv]
        self.status: int | None = None
        """The exit status, negative for a signal; None while it runs."""
        self._output_file = output_file
        self._signalled = False
        self._killed: KilledError | None = None
        self._scratch = scratch
        self._oom_kills = oom.read_oom_kills()
        self._waiting = threading.Lock()
        run_members = _run_members()
        lifeline_r, self._lifeline = os.pipe()
        self._report, report_w = os.pipe()
        words = [
            *(str(lifeline_r), str(report_w)),
            " ".join(f"{pid}:{start}" for pid, start in run_members),
            " ".join(map(str, pass_fds)),
            *(str(scratch or ""), str(cwd or "")),
        ]
        try:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_KEEPER), *words, *self.argv],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=dict(env) if env is not None else None,
                pass_fds=[*pass_fds, lifeline_r, report_w],
            )
        finally:
            os.close(lifeline_r)
            os.close(report_w)
        self._lines = b""
        try:
            kind, value = self._next_report(None) or ("", "")
        except BaseException:
            # Usually ^C; the program may already be running.
            self._hang_up()
            self._keeper.wait()
            raise
        if kind != "pid":
            self._close()
            reason, hint = value or "its keeper was killed", None
            if kind == "ended":
                reason = f"process {value} of this run has ended"
                hint = f"if it belonged to another run, unset {_RUN}"
            raise HostError(f"cannot start {self.argv[0]}: {reason}", hint=hint)
        self.pid = int(value)
        """The program's own process id."""

    @property
    def stdout(self) -> int:
        """The read end of the program's standard output, if that is subprocess.PIPE."""
        if self._keeper.stdout is None:
            raise ValueError("stdout is not a pipe")
        return self._keeper.stdout.fileno()

    def fileno(self) -> int:
        """A descriptor that polls readable when the program has ended."""
        return self._report

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for the end; return the exit status, or None if it still runs after `timeout_s`.

        Raises:
            KilledError: it was ended from outside, not through kill() or send_signal().
        """
        with self._waiting:
            if self.status is None:
                report = self._next_report(timeout_s)
                if report is None:
                    return None
                # No report: the keeper itself was killed, and the kernel killed the program.
                end, status = report
                self.status = int(status) if end else -signal.SIGKILL
                self._killed = self._judge_end(end, self.status)
                self._close()
        if self._killed is not None:
            raise self._killed
        return self.status

    def kill(self) -> int:
        """Kill the program and all its descendants; return when they have ended.

        Raises:
            KilledError: it had already been ended from outside.
            HostError: a process is still alive after 60 s (in uninterruptible sleep).
        """
        if self.status is None:
            self._hang_up()
        status = self.wait(_KILL_LIMIT_S)
        if status is None:
            raise HostError(f"process {self.pid} ({self.argv[0]}) does not die")
        return status

    def send_signal(self, number: signal.Signals) -> None:
        """Send the program a signal; if that ends it, wait() raises no KilledError."""
        self._signalled = True
        os.kill(self.pid, number)

    def _judge_end(self, end: str, status: int) -> KilledError | None:
        """The external cause of the program's end; None if it ended by itself or through us."""
        if end == keeper.REQUESTED or self._signalled:
            return None
        program = f"{_name(self.argv)} (process {self.pid})"
        if end == keeper.RUN_ENDED:
            return KilledError(f"{program} was ended because a process of its run has ended")
        if not end:
            facts, by_oom = oom.evidence(self._keeper.pid, self._oom_kills)
            text = f"the keeper of {program} was killed from outside: {facts}"
            return KilledError(text, hint=oom.HINT if by_oom else None)
        if status == -signal.SIGKILL:
            facts, by_oom = oom.evidence(self.pid, self._oom_kills)
            text = f"{program} was killed by SIGKILL from outside: {facts}"
            return KilledError(text, hint=oom.HINT if by_oom else None)
        if status == -signal.SIGBUS and (place := self._scratch) is not None:
            # A store to a hole of a sparse file, on a full file system.
            free = shutil.disk_usage(place).free
            text = f"{program} was killed by SIGBUS: no space left in {place.parent}"
            hint = "free some, or set scratch_dir"
            return KilledError(text, hint=hint) if free < _FULL_BYTES else None
        if status < 0 and -status not in _OWN_SIGNALS:
            return KilledError(f"{program} was {describe_status(status)} from outside")
        if status == 0 and self._output_file is not None:
            match = _TERMINATED.search(self._output_file.read_text(errors="replace"))
            return KilledError(f"{program} was ended from outside by {match[1]}") if match else None
        return None

    def _hang_up(self) -> None:
        """Ask the keeper to end the program."""
        with contextlib.suppress(OSError):
            os.write(self._lifeline, keeper.END)

    def _next_report(self, timeout_s: float | None) -> tuple[str, str] | None:
        """The keeper's next line, as kind and value.

        None if none came in time; two empty strings if the keeper has ended.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._lines:
            remaining_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            poll = select.poll()
            poll.register(self._report, select.POLLIN)
            if not poll.poll(None if remaining_s is None else remaining_s * 1000):
                return None
            chunk = os.read(self._report, 4096)
            if not chunk:
                return "", ""
            self._lines += chunk
        line, _, self._lines = self._lines.partition(b"\n")
        kind, _, value = line.decode().partition(" ")
        return kind, value

    def _close(self) -> None:
        for handle in (self._lifeline, self._report):
            if handle >= 0:
                with contextlib.suppress(OSError):
                    os.close(handle)
        self._keeper.wait()


class StoppedError(Exception):
    """A background task was stopped because the foreground failed."""


class BackgroundTask(Generic[T]):
    """A task that runs in a thread, concurrently with its caller."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def check(self) -> None:
        """Raise the exception of the task, if it has already failed."""
        if self._future.done():
            self._future.result()

    def result(self) -> T:
        """Wait for the task's end; return its result or raise its exception."""
        return self._future.result()


@contextlib.contextmanager
def run_in_background(task: Callable[[Callable[[], None]], T]) -> Iterator[BackgroundTask[T]]:
    """Run a task in a thread, concurrently with the body of the `with`; wait for its end.

    Args:
        task: its argument is a function that it must call several times a second, and that raises
            StoppedError once the body has failed.
    """
    stop = threading.Event()

    def proceed() -> None:
        if stop.is_set():
            raise StoppedError

    def run_task() -> T:
        with log.in_background():
            return task(proceed)

    with ThreadPoolExecutor(1) as pool:
        try:
            yield BackgroundTask(pool.submit(run_task))
        except BaseException:
            stop.set()
            raise


@dataclass(frozen=True)
class Completed:
    """Output of a tool (lines of both streams), its duration, s, and its exit status."""

    lines: tuple[str, ...]
    duration_s: float
    status: int

    @property
    def text(self) -> str:
        """The output as one string."""
        return "\n".join(self.lines)


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    log_file: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    idle_s: float | None = None,
    on_idle: Callable[[], None] | None = None,
    keep_lines: int = 2000,
    check: bool = True,
) -> Completed:
    """Run a tool to its end; it cannot outlive us, nor can its descendants.

    Args:
        argv: the command line.
        cwd: working directory.
        env: its complete environment; None: ours.
        timeout_s: time limit, after which it is killed.
        log_file: file to which its output is appended.
        on_line: called with each line of its output, stdout and stderr together.
        idle_s, on_idle: call `on_idle` at least every `idle_s` seconds while it runs.
        keep_lines: maximum number of last lines in the result.
        check: an exit status other than 0 is an error.

    Raises:
        HostError: it cannot be started, fails or times out; with the last lines of its output.
    """
    started = time.monotonic()
    lines: deque[str] = deque(maxlen=keep_lines)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log_file.open("ab")) if log_file else None
        process = Process(argv, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        stack.callback(process.kill)
        rest = b""
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while True:
            waits = [w for w in (idle_s,) if w is not None]
            if timeout_s is not None:
                waits.append(max(0.0, started + timeout_s - time.monotonic()))
            ready = poll.poll(min(waits) * 1000 if waits else None)
            if on_idle is not None:
                on_idle()
            if timeout_s is not None and time.monotonic() - started >= timeout_s:
                process.kill()
                raise _failure(argv, f"took more than {timeout_s:g} s", lines, log_file)
            if not ready:
                continue
            chunk = os.read(process.stdout, 65536)
            if output is not None:
                output.write(chunk)
            rest += chunk
            *complete, rest = rest.split(b"\n") if chunk else ([rest, b""] if rest else [b""])
            for raw in complete:
                line = raw.decode(errors="replace").rstrip("\r")
                lines.append(line)
                if on_line is not None:
                    on_line(line)
            if not chunk:
                break
        status = process.wait()
    assert status is not None  # noqa: S101 - without a limit, wait() returns at the end
    if status and check:
        raise _failure(argv, describe_status(status), lines, log_file)
    return Completed(tuple(lines), time.monotonic() - started, status)


def _failure(
    argv: Sequence[str | Path], reason: str, lines: Sequence[str], log_file: Path | None
) -> HostError:
    command = shlex.join(str(word) for word in argv)
    last = "\n".join(f"    {line}" for line in list(lines)[-15:]) or "    (no output)"
    hint = f"the whole output: {log_file}" if log_file else None
    return HostError(f"{command}: {reason}; its last lines:\n{last}", hint=hint)
