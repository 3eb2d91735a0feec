# SPDX-License-Identifier: GPL-2.0-or-later
"""Result of a command in the guest, over whatever channel it ran."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

from paprscm import log, timesheet
from paprscm.errors import ContractError, GuestLostError, HostError
from paprscm.log import quoted

_CRASHES = (signal.SIGILL, signal.SIGABRT, signal.SIGFPE, signal.SIGSEGV, signal.SIGSYS)


@dataclass(frozen=True)
class CommandResult:
    """One command in the guest and its results.

    Attributes:
        command: the shell code.
        status: the exit status; 128 + n if signal n ended the command.
        stdout, stderr: output as text, with invalid UTF-8 replaced.
        stdout_bytes: stdout, unchanged.
        duration_s: time from the request to the exit status, s.
    """

    command: str
    status: int
    stdout: str
    stderr: str
    stdout_bytes: bytes
    duration_s: float

    @property
    def tool_failure(self) -> str:
        """Reason why the status is not a verdict on the kernel under test; "" if it may be one.

        A POSIX shell returns 126 and 127 for a program that it cannot execute or find. A signal of
        _CRASHES means a bug in the program or an instruction that the CPU lacks. SIGBUS is not one
        of them, because DAX mappings raise it; nor is SIGKILL.
        """
        if self.status in (126, 127):
            what = "is missing" if self.status == 127 else "cannot be executed"
            return f"a program {what} in the guest's userland"
        if self.status - 128 in _CRASHES:
            return f"a program in the guest crashed, {signal.Signals(self.status - 128).name}"
        return ""


TOOLS_FOLDER = PurePosixPath("/tmp/paprscm-tools")  # noqa: S108 - a folder of the guest


class TimedOutError(GuestLostError):
    """A command did not end within its limit; the guest is lost."""


def short(command: str) -> str:
    """The first line of a command, for a message."""
    lines = command.strip().splitlines() or [""]
    return lines[0][:100] + (" …" if len(lines) > 1 or len(lines[0]) > 100 else "")


def indented(output: bytes | bytearray) -> str:
    """The last lines of a command's output, for a message."""
    lines = bytes(output).decode(errors="replace").splitlines()[-10:]
    return "\n".join(f"    {line}" for line in lines) or "    (nothing)"


@contextmanager
def counted(command: str) -> Iterator[None]:
    """Count the time of a command, as that of a guest tool if it names one."""
    tools = ("tools",) if str(TOOLS_FOLDER) in command else ()
    with timesheet.during("commands", *tools):
        yield


def log_command(result: CommandResult) -> None:
    """Write a command, its status, duration and output to the test's log."""
    log.logger.debug(
        "guest: status %d, %.2f s: %s", result.status, result.duration_s, result.command
    )
    if b"\0" in result.stdout_bytes:
        log.logger.debug("guest: stdout: %d bytes", len(result.stdout_bytes))
    elif result.stdout:
        log.logger.debug("guest: stdout:\n%s", quoted(result.stdout, last=200))
    if result.stderr:
        log.logger.debug("guest: stderr:\n%s", quoted(result.stderr, last=200))


def outcome(result: CommandResult) -> str:
    """Describe a command, its status and its output, for an error."""
    return (
        f"`{result.command}` ended with status {result.status}\n  stdout:\n"
        f"{quoted(result.stdout)}\n  stderr:\n{quoted(result.stderr)}"
    )


def require_valid(result: CommandResult) -> CommandResult:
    """Return the result if its status can be a verdict on the kernel under test.

    Raises:
        HostError: a program is missing in the userland, or crashed.
    """
    if result.tool_failure:
        raise HostError(f"{result.tool_failure}: {outcome(result)}")
    return result


def require_success(result: CommandResult) -> CommandResult:
    """Return the result if its status is 0.

    Raises:
        ContractError: it is another one.
        HostError: as require_valid().
    """
    if require_valid(result).status:
        raise ContractError(f"{outcome(result)}, expected 0")
    return result
