# SPDX-License-Identifier: GPL-2.0-or-later
"""Exit statuses of guest commands that are not results of the kernel under test."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from typing import cast

import pytest

from paprscm.channel.command import CommandResult
from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest


def result_of(command: str) -> CommandResult:
    """Run a command in this host's shell, as `Ssh.run` does in the guest's."""
    done = subprocess.run(
        ["/bin/sh", "-c", f"{command}\nexit $?"], capture_output=True, text=True, check=False
    )
    return CommandResult(command, done.returncode, done.stdout, done.stderr, b"", 0.0)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-program", "a program is missing in the guest's userland"),
        ("/etc/passwd", "a program cannot be executed in the guest's userland"),
        ("sh -c 'kill -ILL $$'", "a program in the guest crashed, SIGILL"),
        ("sh -c 'kill -SEGV $$'", "a program in the guest crashed, SIGSEGV"),
        ("sh -c 'kill -ABRT $$'", "a program in the guest crashed, SIGABRT"),
        # SIGBUS of a DAX mapping and SIGKILL of the OOM killer may be results of the kernel.
        ("sh -c 'kill -BUS $$'", ""),
        ("sh -c 'kill -KILL $$'", ""),
        ("false", ""),
        ("true", ""),
        (f"exit {128 + signal.SIGRTMIN}", ""),
        ("exit 255", ""),
    ],
)
def test_a_tool_that_could_not_report(command: str, message: str) -> None:
    assert result_of(command).tool_failure == message


class Shell:
    """A guest that uses this host's shell."""

    def run(self, command: str, **_limits: object) -> CommandResult:
        return result_of(command)


@pytest.mark.parametrize("verb", [Guest.succeed, Guest.fail, Guest.wait_until])
def test_a_missing_program_is_a_host_error_for_each_verb(
    verb: Callable[[Guest, str], object],
) -> None:
    with pytest.raises(HostError, match="a program is missing"):
        verb(cast(Guest, Shell()), "no-such-program")


def test_other_statuses_are_results() -> None:
    guest = cast(Guest, Shell())
    assert Guest.succeed(guest, "echo yes") == "yes"
    assert Guest.fail(guest, "exit 3").status == 3
    assert Guest.wait_until(guest, "echo yes") == "yes"
    with pytest.raises(ContractError, match="expected 0"):
        Guest.succeed(guest, "false")
    with pytest.raises(ContractError, match="still fails after 0 s"):
        Guest.wait_until(guest, "echo no; false", timeout_s=0)
