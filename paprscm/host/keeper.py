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

    keeper.py LIFELINE REPORT RUN PASS_FDS SCRATCH FOLDER PROGRAM [WORD …]

LIFELINE and REPORT are descriptors, RUN has PID:START of each member, PASS_FDS the descriptors for
the program, SCRATCH and FOLDER (the working directory) may be empty. Lines of the report:

    pid PID             the program runs
    error TEXT          it cannot be started
    ended PID           this member of the run has ended already; the program was not started
    own STATUS          it has ended by itself, with this status, negative for a signal
    asked STATUS        it was killed because the parent requested that
    run STATUS          it was killed because a process of the run has ended

A run of the suite starts some two thousand. So it runs by path, isolated and without site, and
imports no module of the package and none that it can do without, which halves the time of a start.
"""

import ctypes
import os
import select
import signal
import sys

# The parent writes this to the lifeline to end the program.
END = b"k"

# First word of the last report.
PROGRAM_ENDED, REQUESTED, RUN_ENDED = "own", "asked", "run"

# Poll interval for processes without a pidfd.
POLL_MS = 100

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_ENDING = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM)


def read(path: str) -> str:
    """Return the text of a file; invalid bytes are replaced."""
    # Not by pathlib, whose import takes longer than the start of Python.
    with open(path, errors="replace") as file:  # noqa: PTH123
        return file.read()


def start_time(pid: int) -> str:
    """Clock ticks from boot to the start of a process, as digits; empty if it has ended.

    Process ids are reused; id and start time together identify a process.
    """
    try:
        # pid (comm) state ppid pgrp …; comm may contain any character: parse after its last ')'.
        stat = read(f"/proc/{pid}/stat")
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


def kill_all(program: int) -> int:
    """Kill the program, its process group and all other descendants; return its status."""
    try:  # noqa: SIM105 - contextlib would have to be imported.
        os.killpg(program, signal.SIGKILL)
    except ProcessLookupError:
        pass
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    # We are their subreaper: orphans of the program are our children now.
    me = os.getpid()
    while children := read(f"/proc/self/task/{me}/children").split():
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        for child in children:
            os.waitpid(int(child), 0)
    return status


def send_report(report: int, kind: str, value: int | str) -> None:
    """Write a line to the parent, if it still exists."""
    try:  # noqa: SIM105
        os.write(report, f"{kind} {value}\n".encode())
    except BrokenPipeError:
        pass


def start(argv: list[str], folder: str, libc: ctypes.CDLL) -> int:
    """Start the program in a process group of its own; return its process id.

    Raises:
        OSError: it cannot be started.
    """
    me = os.getpid()
    # execve(2) closes the program's end.
    failed_r, failed_w = os.pipe()
    # One thread, so no deadlock in the child.
    pid = os.fork()
    if not pid:
        try:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != me:
                os._exit(1)
            os.setpgid(0, 0)
            # Python ignores the last two.
            for number in (*_ENDING, signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            if folder:
                os.chdir(folder)
            os.execvp(argv[0], argv)  # noqa: S606
        except OSError as error:
            os.write(failed_w, str(error.errno).encode())
        finally:
            os._exit(255)
    os.close(failed_w)
    errno = os.read(failed_r, 16)
    os.close(failed_r)
    if errno:
        os.waitpid(pid, 0)
        raise OSError(int(errno), os.strerror(int(errno)))
    return pid


def main() -> None:
    lifeline, report = int(sys.argv[1]), int(sys.argv[2])
    run, pass_fds, scratch, folder, *argv = sys.argv[3:]
    # ^C goes to all processes in the terminal's foreground group. The parent decides about the
    # program's end, and requests it through the lifeline.
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    members = [word.split(":") for word in run.split()]
    watch = Watch([(int(pid), start) for pid, start in members])
    if watch.ended is not None:
        send_report(report, "ended", watch.ended)
        return
    # A pipe that becomes readable when a child ends.
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    os.set_inheritable(lifeline, False)
    os.set_inheritable(report, False)
    try:
        program = start(argv, folder, libc)
    except OSError as error:
        send_report(report, "error", str(error.strerror))
        return
    for word in pass_fds.split():
        os.close(int(word))
    send_report(report, "pid", program)

    poll = select.poll()
    for handle in (woken, lifeline, *watch.pidfds):
        poll.register(handle, select.POLLIN)
    ready: set[int] = set()
    end = ""
    while not end:
        ready = {handle for handle, _events in poll.poll(watch.interval_ms)}
        if woken in ready:
            os.read(woken, 4096)
        if has_ended(program):
            end = PROGRAM_ENDED
        elif lifeline in ready:
            # A parent that requests the end writes END before it closes the pipe. A killed parent
            # only closes it, and its pidfd may become readable a moment later.
            end = REQUESTED if os.read(lifeline, 1) == END else RUN_ENDED
        elif ready - {woken} or (watch.interval_ms is not None and watch.find_ended() is not None):
            end = RUN_ENDED
    status = kill_all(program)
    if end == RUN_ENDED and scratch:
        # No other process is left to do it.
        import shutil

        shutil.rmtree(scratch, ignore_errors=True)
    send_report(report, end, status)


if __name__ == "__main__":
    main()
