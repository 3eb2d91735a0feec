# SPDX-License-Identifier: GPL-2.0-or-later
"""Run one program, and end it as soon as a process of its run ends.

A test process can be killed with SIGKILL, and so can `avocado`, `make` or this keeper. If any of
them dies, the program must die, too:

* The keeper watches its parent and the members of the run (process.py lists them) through pidfds;
  no other ancestors, because a shell that only started the run may end. It also watches a pipe
  whose other end its parent holds. When one of them ends, it kills the program's process group and
  removes the scratch folder.
* The program is killed by the kernel when the keeper dies (prctl(2), PR_SET_PDEATHSIG). The parent
  cannot use that setting: the signal comes when the *thread* that forked ends, and Avocado runs
  setUp and tearDown in different threads. The keeper has one thread.

If pidfd_open(2) is not permitted (by the seccomp profile of Docker before 20.10), the keeper reads
/proc every 100 ms instead.

It runs by path, isolated and without site, to start within about 15 ms; so it imports no module of
the package.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# The parent writes this to the lifeline to end the program.
END = b"k"

# Values of "end" in the last report: the program ended by itself; the parent requested its end; a
# process of the run has ended.
PROGRAM_ENDED, REQUESTED, RUN_ENDED = "own", "asked", "run"

# Poll interval for processes without a pidfd.
POLL_MS = 100

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def start_time(pid: int) -> str:
    """Clock ticks from boot to the start of a process, as digits; empty if it has ended.

    Process ids are reused; id and start time together identify a process.
    """
    try:
        # pid (comm) state ppid pgrp …; comm may contain any character: parse after its last ')'.
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


class Watch:
    """Processes that must all stay alive.

    Args:
        run: process id and start time of each; an empty time: it has already ended.

    Attributes:
        pidfds: poll readable when their process ends.
        interval_ms: interval of additional calls of find_ended(); None: not needed.
        ended: a process that had already ended; None: all are alive.
    """

    def __init__(self, run: list[tuple[int, str]]) -> None:
        self.pidfds: list[int] = []
        self.interval_ms: int | None = None
        self._run = run
        for pid, _start in run:
            try:
                self.pidfds.append(os.pidfd_open(pid))
            except ProcessLookupError:
                break
            except (OSError, AttributeError):  # EPERM, ENOSYS; Python built with old headers.
                self.interval_ms = POLL_MS
        self.ended = self.find_ended()

    def find_ended(self) -> int | None:
        """A process that has ended; None: all are alive."""
        return next(
            (pid for pid, start in self._run if not start or start_time(pid) != start), None
        )


def has_ended(child: int) -> bool:
    """Return True if a child has ended; it stays a zombie, which keeps its process id in use."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_all(program: subprocess.Popen[bytes]) -> int:
    """Kill the program, its process group and all other descendants; return its status."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    status = program.wait()
    # We are their subreaper: orphans of the program are our children now.
    me = os.getpid()
    while children := Path(f"/proc/self/task/{me}/children").read_text().split():
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        for child in children:
            os.waitpid(int(child), 0)
    return status


def send_report(report: int, **fields: int | str) -> None:
    """Write a line of JSON to the parent, if it still exists."""
    with contextlib.suppress(BrokenPipeError):
        os.write(report, json.dumps(fields).encode() + b"\n")


def main() -> None:
    spec = json.loads(sys.argv[1])
    lifeline, report = spec["lifeline"], spec["report"]
    # ^C goes to all processes in the terminal's foreground group. The parent decides about the
    # program's end, and requests it through the lifeline.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    me = os.getpid()

    watch = Watch([(pid, start) for pid, start in spec["run"]])
    if watch.ended is not None:
        send_report(report, ended=watch.ended)
        return
    # A pipe that becomes readable when a child ends.
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    def in_program() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != me:
            os._exit(1)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    os.set_inheritable(lifeline, False)
    os.set_inheritable(report, False)
    try:
        program = subprocess.Popen(
            spec["argv"],
            cwd=spec["cwd"],
            pass_fds=spec["pass_fds"],
            process_group=0,
            preexec_fn=in_program,  # One thread, so no deadlock.
        )
    except OSError as error:
        send_report(report, error=str(error.strerror))
        return
    for handle in spec["pass_fds"]:
        os.close(handle)
    send_report(report, pid=program.pid)

    poll = select.poll()
    for handle in (woken, lifeline, *watch.pidfds):
        poll.register(handle, select.POLLIN)
    ready: set[int] = set()
    end = ""
    while not end:
        ready = {handle for handle, _events in poll.poll(watch.interval_ms)}
        if woken in ready:
            os.read(woken, 4096)
        if has_ended(program.pid):
            end = PROGRAM_ENDED
        elif lifeline in ready:
            # A parent that requests the end writes END before it closes the pipe. A killed parent
            # only closes it, and its pidfd may become readable a moment later.
            end = REQUESTED if os.read(lifeline, 1) == END else RUN_ENDED
        elif ready - {woken} or (watch.interval_ms is not None and watch.find_ended() is not None):
            end = RUN_ENDED
    status = kill_all(program)
    if end == RUN_ENDED and spec["scratch"]:
        # No other process is left to do it.
        shutil.rmtree(spec["scratch"], ignore_errors=True)
    send_report(report, status=status, end=end)


if __name__ == "__main__":
    main()
