# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools/persist.c in the guest: what each system call on a file answered, and when.

And how often the guest's kernel asked the hypervisor, to compare with what the host saw.
"""

from __future__ import annotations

import shlex
from typing import Literal

from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.report import Fields, Natural, ToolReport, believed, check_report, read_report
from paprscm.guest.tools import compile_tool


class Syscall(Fields, frozen=True, kw_only=True):
    """One system call.

    Attributes:
        step: which; see guest_tools/persist.c.
        offset, length: of its range in the file, bytes; 0 where it has none.
        byte: what was written; what all bytes that were read are, or None if they differ.
        result: what it returned; None: it failed.
        errno: with which number; 0: it did not.
        error: its name, "EIO"; "" when it did not fail.
        begin_ns, end_ns: by the guest's CLOCK_MONOTONIC, ns.
    """

    step: Literal[
        "open",
        "write",
        "dwrite",
        "store",
        "msync",
        "fsync",
        "fdatasync",
        "syncfs",
        "read",
        "await",
    ]
    offset: Natural
    length: Natural
    byte: Natural | None
    result: Natural | None
    errno: Natural
    error: str
    begin_ns: Natural
    end_ns: Natural

    def __post_init__(self) -> None:
        check_report(
            (self.result is None) == bool(self.errno) == bool(self.error),
            f"{self.step} has result {self.result} and errno {self.errno} ({self.error!r})",
        )
        check_report(self.begin_ns <= self.end_ns, f"{self.step} ends before it begins")

    @property
    def duration_s(self) -> float:
        """Duration, s."""
        return (self.end_ns - self.begin_ns) / 1e9

    def __str__(self) -> str:
        answer = f"{self.error} ({self.errno})" if self.error else str(self.result)
        return f"{self.step}: {answer}"


class _PersistReport(ToolReport, frozen=True, kw_only=True):
    tool: Literal["persist"]
    steps: tuple[Syscall, ...]


def persist(
    guest: Guest, path: str, *steps: str, timeout_s: float | None = None
) -> tuple[Syscall, ...]:
    """Make system calls on one file of the guest, in one round trip; what each answered.

    Args:
        guest: where.
        path: the file; made if it is not there.
        steps: as guest_tools/persist.c wants them: "write=0:65536:7", "fsync", …
        timeout_s: of all together; the setting command_limit_s when None.

    Raises:
        ProbeError: the program does not build, or gave no report that can be believed.
        ContractError: the file cannot be opened.
    """
    tool = compile_tool(guest, "persist")
    result = guest.run(shlex.join([str(tool), path, *steps]), timeout_s=timeout_s)
    return parse_persist(result.stdout, result.status, steps, result.stderr)


class HeldFile:
    """A program in the guest that has made its steps up to "await", and keeps its file open.

    Args:
        guest: where it runs.
        path: the file; created if it does not exist.
        steps: as for `persist`, with one "await" among them.

    Raises:
        ProbeError: the program does not compile in the guest.
    """

    def __init__(self, guest: Guest, path: str, *steps: str) -> None:
        self._guest, self._steps = guest, steps
        words = shlex.join([str(compile_tool(guest, "persist")), path, *steps])
        # The end of the program releases the lock; "await", or its end, closes "ready".
        self._folder = guest.succeed(
            "folder=$(mktemp -d) && cd $folder && mkfifo go ready && echo $folder\n"
            f"flock --no-fork lock {words} <>go >out 2>err 3>ready &\n"
            "echo $! > pid\n"
            "cat ready"
        )

    def go(self) -> None:
        """Let it go on behind "await"; returns at once."""
        self._guest.succeed(f"cd {self._folder} && echo 1<>go")

    def wait_blocked(self) -> bool:
        """Wait until it sleeps in the kernel or has ended; return True for the former.

        Raises:
            HostError: neither within 30 s.
        """
        found = self._guest.run(
            f"pid=$(cat {self._folder}/pid)\n"
            "for _ in $(seq 1500); do\n"
            "    case $(grep State: /proc/$pid/status 2>&1) in\n"
            '        *"(disk sleep)"*) exit 0 ;;\n'
            '        *"(zombie)"* | *"No such"*) exit 1 ;;\n'
            "    esac\n"
            "    sleep 0.02\n"
            "done\n"
            "exit 2"
        )
        if found.status > 1:
            raise HostError(f"{shlex.join(self._steps)} neither blocks nor ends within 30 s")
        return not found.status

    def result(self) -> tuple[Syscall, ...]:
        """Let it go on unless it has, wait for its end, and return all its steps.

        Raises:
            ProbeError: it gave no valid report.
            ContractError: the file could not be opened.
        """
        wait = "echo 1<>go; flock lock cat out && cat err >&2"
        result = self._guest.run(f"cd {self._folder} && {wait}")
        return parse_persist(result.stdout, result.status, self._steps, result.stderr)


def parse_persist(
    stdout: str, status: int, asked: tuple[str, ...], stderr: str = ""
) -> tuple[Syscall, ...]:
    """Parse a report; nothing in it may be missing, unknown or contradictory.

    Args:
        stdout: what it printed, one line of JSON.
        status: its exit status.
        asked: the steps that it was given.
        stderr: for the message.

    Raises:
        ProbeError: with what is wrong.
        ContractError: the file could not be opened.
    """
    done = read_report(_PersistReport, stdout, status, stderr).steps
    expected = ["open", *(word.partition("=")[0] for word in asked)]
    if done and done[0].error:
        expected = expected[:1]
    with believed("persist", stdout, status, stderr):
        steps = [step.step for step in done]
        check_report(steps == expected, f"the steps are {steps}, not {expected}")
    opened, *others = done
    if opened.error:
        raise ContractError(f"the file cannot be opened: {opened.error}")
    return tuple(others)
