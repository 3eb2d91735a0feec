# SPDX-License-Identifier: GPL-2.0-or-later
"""Run one program for as long as the run that wants it lives, and not a moment longer.

A test process can be killed with SIGKILL, and so can `avocado`, `make` or this keeper. Whoever
dies, the program must die too:

* The keeper watches, through pidfds, its parent, every ancestor in the parent's process group (that
  is what one `make suite` or `avocado run` is), and those that process.py names as the run's: one
  that died before we came is no ancestor any more. It also watches a pipe whose other end its
  parent holds. When one of them ends, it kills the program's whole process group and removes the
  scratch folder.
* The program asks the kernel to be killed when the keeper dies (prctl(2), PR_SET_PDEATHSIG). Of
  the threads of the parent that setting would notice the wrong one: the signal comes when the
  *thread* that forked ends, and Avocado runs setUp and tearDown in different threads. The keeper
  has one thread.

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

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def ancestors(group: int) -> list[int]:
    """Our parent, and its forebears as long as they are in process group `group`."""
    found: list[int] = []
    pid = os.getppid()
    while pid > 1:
        try:
            # pid (comm) state ppid pgrp …; comm may hold anything, so look behind its last ')'.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            break
        if found and int(fields[2]) != group:
            break
        found.append(pid)
        pid = int(fields[1])
    return found


def open_pidfds(pids: list[int]) -> list[int]:
    """A pidfd of each process, which polls readable when it ends.

    Raises:
        ProcessLookupError: one of them has ended already.
    """
    return [os.pidfd_open(pid) for pid in pids]


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


def main() -> None:
    spec = json.loads(sys.argv[1])
    lifeline, report = spec["lifeline"], spec["report"]
    parent = spec["parent"]
    # ^C goes to everyone in the terminal's foreground group; what it means the parent decides,
    # and says so through the lifeline.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    me = os.getpid()

    try:
        watched = open_pidfds([*ancestors(os.getpgrp()), *spec["run"]])
    except ProcessLookupError:
        os.write(report, b'{"error": "the run that wants it was killed"}\n')
        return
    if os.getppid() != parent:
        return

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
        os.write(report, json.dumps({"error": f"{error.strerror}"}).encode() + b"\n")
        return
    for handle in spec["pass_fds"]:
        os.close(handle)
    os.write(report, json.dumps({"pid": program.pid}).encode() + b"\n")

    ended = os.pidfd_open(program.pid)
    poll = select.poll()
    for handle in (ended, lifeline, *watched):
        poll.register(handle, select.POLLIN)
    ready = {handle for handle, _events in poll.poll()}
    status = kill_all(program)
    # A parent that wants the end says so before it hangs up. One that was killed only hangs up, and
    # its pidfd may tell of it a moment later than the pipe does.
    wanted = lifeline in ready and os.read(lifeline, 1) == END
    if ended not in ready and not wanted and spec["scratch"]:
        # Nobody else is left to do it.
        shutil.rmtree(spec["scratch"], ignore_errors=True)
    with contextlib.suppress(BrokenPipeError):
        os.write(report, json.dumps({"status": status}).encode() + b"\n")


if __name__ == "__main__":
    main()
