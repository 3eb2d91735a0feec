# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls on a file in the guest, made by guest_tools/persist.c: results and times."""

from __future__ import annotations

import shlex
from typing import Literal

from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.report import (
    Fields,
    Natural,
    ToolReport,
    check_report,
    malformed_as_probe_error,
    read_report,
)
from paprscm.guest.tools import install_tool, run_tool


class Syscall(Fields, frozen=True, kw_only=True):
    """One system call.

    Attributes:
        step: the call; see guest_tools/persist.c.
        offset, length: its range in the file, bytes; 0 without a range.
        byte: the byte that was written, or that all read bytes equal; None if they differ.
        result: its return value; None: it failed.
        errno: errno of a failed call, or 0.
        error: name of the errno, such as "EIO"; "" for a successful call.
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
        "verity",
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
        """Duration of the call, s."""
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
    """Make system calls on one file of the guest, in one round trip; return their results.

    Args:
        guest: the guest.
        path: the file; created if it does not exist.
        steps: arguments of guest_tools/persist.c: "write=0:65536:7", "fsync", …
        timeout_s: time limit of all steps; None: the setting command_limit_s.

    Raises:
        ProbeError: the program does not compile, or its report is invalid.
        ContractError: the file cannot be opened.
    """
    result = run_tool(guest, "persist", [path, *steps], timeout_s=timeout_s)
    return parse_persist(result.stdout, result.status, steps, result.stderr)


class HeldFile:
    """A program in the guest that has made its steps up to "await" and keeps its file open.

    Args:
        guest: where it runs.
        path: the file; created if it does not exist.
        steps: as for `persist`, with one "await" among them.

    Raises:
        ProbeError: the program does not compile in the guest.
    """

    def __init__(self, guest: Guest, path: str, *steps: str) -> None:
        self._guest, self._steps = guest, steps
        words = shlex.join([str(install_tool(guest, "persist")), path, *steps])
        # The end of the program releases the lock; "await", or its end, closes "ready".
        self._folder = guest.succeed(
            "folder=$(mktemp -d) && cd $folder && mkfifo go ready && echo $folder\n"
            f"flock --no-fork lock {words} <>go >out 2>err 3>ready &\n"
            "echo $! > pid\n"
            "cat ready"
        )

    def go(self) -> None:
        """Continue after "await"; returns at once."""
        self._guest.succeed(f"cd {self._folder} && echo 1<>go")

    def wait_blocked(self) -> bool:
        """Wait until it sleeps in the kernel (return True) or has ended (return False).

        Raises:
            HostError: neither within 30 s.
        """
        result = self._guest.run(
            f"pid=$(cat {self._folder}/pid)\n"
            "for _ in $(seq 1500); do\n"
            "    case $(grep State: /proc/$pid/status 2>&1) in\n"
            '        *"(disk sleep)"*) exit 0 ;;\n'
            '        *"(zombie)"* | *"No such"*) exit 1 ;;\n'
            "    esac\n"
            # A change of a process's state causes no event.
            "    sleep 0.02\n"
            "done\n"
            "exit 2"
        )
        if result.status > 1:
            raise HostError(f"{shlex.join(self._steps)} neither blocks nor ends within 30 s")
        return not result.status

    def result(self) -> tuple[Syscall, ...]:
        """Continue after "await" if needed, wait for the end, and return all steps.

        Raises:
            ProbeError: its report is invalid.
            ContractError: the file could not be opened.
        """
        wait = "echo 1<>go; flock lock cat out && cat err >&2"
        result = self._guest.run(f"cd {self._folder} && {wait}")
        return parse_persist(result.stdout, result.status, self._steps, result.stderr)


def parse_persist(
    stdout: str, status: int, requested: tuple[str, ...], stderr: str = ""
) -> tuple[Syscall, ...]:
    """Parse a report; no field may be missing, unknown or contradictory.

    Args:
        stdout: one line of JSON.
        status: exit status of persist.
        requested: the steps on its command line.
        stderr: other output, for the message.

    Raises:
        ProbeError: the report is invalid.
        ContractError: the file could not be opened.
    """
    reported = read_report(_PersistReport, stdout, status, stderr).steps
    expected = ["open", *(word.partition("=")[0] for word in requested)]
    if reported and reported[0].error:
        expected = expected[:1]
    with malformed_as_probe_error("persist", stdout, status, stderr):
        steps = [step.step for step in reported]
        check_report(steps == expected, f"the steps are {steps}, not {expected}")
    opened, *others = reported
    if opened.error:
        raise ContractError(f"the file cannot be opened: {opened.error}")
    return tuple(others)
