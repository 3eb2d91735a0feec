# SPDX-License-Identifier: GPL-2.0-or-later
"""Exit statuses of commands in the guest that say nothing about its kernel."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from typing import cast

import pytest

from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.ssh import CommandResult


def result_of(command: str) -> CommandResult:
    """What this host's shell makes of a command, as the guest's does (`Ssh.run`)."""
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
        # A DAX mapping raises it, the kernel's OOM killer sends it; both may be the product's.
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
    """A guest whose shell is this host's."""

    def run(self, command: str, **_limits: object) -> CommandResult:
        return result_of(command)


@pytest.mark.parametrize("verb", [Guest.succeed, Guest.fail, Guest.wait_until])
def test_no_verb_takes_it_for_the_kernels_fault(verb: Callable[[Guest, str], object]) -> None:
    with pytest.raises(HostError, match="a program is missing"):
        verb(cast(Guest, Shell()), "no-such-program")


def test_what_succeeds_and_fails_as_before() -> None:
    guest = cast(Guest, Shell())
    assert Guest.succeed(guest, "echo yes") == "yes"
    assert Guest.fail(guest, "exit 3").status == 3
    assert Guest.wait_until(guest, "echo yes") == "yes"
    with pytest.raises(ContractError, match="expected 0"):
        Guest.succeed(guest, "false")
    with pytest.raises(ContractError, match="still fails after 0 s"):
        Guest.wait_until(guest, "echo no; false", timeout_s=0)
