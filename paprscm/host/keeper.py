# SPDX-License-Identifier: GPL-2.0-or-later
"""Run one program for as long as the run that wants it lives, and not a moment longer.

A test process can be killed with SIGKILL, and so can `avocado`, `make` or this keeper. Whichever
dies, the program must die too:

* The keeper watches, through pidfds, its parent and the processes that have declared themselves
  part of the run (process.py lists them); no other ancestor, because a shell that only started the
  run may end. It also watches a pipe whose other end its parent holds. When one of them ends, it
  kills the program's whole process group and removes the scratch folder.
* The program asks the kernel to be killed when the keeper dies (prctl(2), PR_SET_PDEATHSIG). Of
  the threads of the parent that setting would notice the wrong one: the signal comes when the
  *thread* that forked ends, and Avocado runs setUp and tearDown in different threads. The keeper
  has one thread.

Where pidfd_open(2) is refused (by the seccomp profile of Docker before 20.10), it reads /proc every
100 ms instead.

Run by path, isolated and without site, so that it starts in some 15 ms: it imports nothing of ours.
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

# What the parent writes to the lifeline when it wants the program's end.
END = b"k"

# The last report's "end": the program ended without the keeper's help; the parent asked for it; a
# process of the run has ended.
PROGRAM_ENDED, REQUESTED, RUN_ENDED = "own", "asked", "run"

# How often to look for processes of which no pidfd can be had.
POLL_MS = 100

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def start_time(pid: int) -> str:
    """Clock ticks from boot to the start of a process, as digits; empty if it has ended.

    A process id is used again; with its start time it names one process.
    """
    try:
        # pid (comm) state ppid pgrp …; comm may hold anything, so look behind its last ')'.
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


class Watch:
    """Processes of which none may end.

    Args:
        run: process id and start time of each; an empty time: it has ended already.

    Attributes:
        pidfds: they poll readable when their process ends.
        interval_ms: how often to ask lost() in addition; None: never.
        ended: the process that had ended already; None: they all live.
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
            except (OSError, AttributeError):  # EPERM, ENOSYS; a Python built with old headers.
                self.interval_ms = POLL_MS
        self.ended = self.lost()

    def lost(self) -> int | None:
        """One that has ended; None: they all live."""
        return next(
            (pid for pid, start in self._run if not start or start_time(pid) != start), None
        )


def has_ended(child: int) -> bool:
    """True if a child has ended; it stays a zombie, so that its process id is not reused."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_all(program: subprocess.Popen[bytes]) -> int:
    """Kill the program, its process group and every descendant that left it; return its status."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    status = program.wait()
    # We are their subreaper: what the program's death orphaned is our child now.
    me = os.getpid()
    while children := Path(f"/proc/self/task/{me}/children").read_text().split():
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        for child in children:
            os.waitpid(int(child), 0)
    return status


def send_report(report: int, **words: int | str) -> None:
    """Write a line of JSON to the parent, which may be gone."""
    with contextlib.suppress(BrokenPipeError):
        os.write(report, json.dumps(words).encode() + b"\n")


def main() -> None:
    spec = json.loads(sys.argv[1])
    lifeline, report = spec["lifeline"], spec["report"]
    # ^C goes to everyone in the terminal's foreground group; what it means the parent decides,
    # and says so through the lifeline.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    me = os.getpid()

    watch = Watch([(pid, start) for pid, start in spec["run"]])
    if watch.ended is not None:
        send_report(report, ended=watch.ended)
        return
    # A pipe that is readable when a child has ended.
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
            preexec_fn=in_program,  # One thread: nothing to deadlock with.
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
            # A parent that wants the end says so before it hangs up; one that was killed only hangs
            # up, and its pidfd may tell of it a moment later than the pipe does.
            end = REQUESTED if os.read(lifeline, 1) == END else RUN_ENDED
        elif ready - {woken} or (watch.interval_ms is not None and watch.lost() is not None):
            end = RUN_ENDED
    status = kill_all(program)
    if end == RUN_ENDED and spec["scratch"]:
        # Nobody else is left to do it.
        shutil.rmtree(spec["scratch"], ignore_errors=True)
    send_report(report, status=status, end=end)


if __name__ == "__main__":
    main()
