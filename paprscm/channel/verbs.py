# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's verbs: commands that must succeed, fail, or succeed in time; files."""

from __future__ import annotations

import shlex
from pathlib import Path

from paprscm import timesheet
from paprscm.channel.command import CommandResult, outcome, require_success, require_valid
from paprscm.errors import ContractError
from paprscm.log import quoted


class Verbs:
    """Verbs on top of run()."""

    def run(
        self, command: str, *, timeout_s: float | None = None, stdin: bytes = b""
    ) -> CommandResult:
        """Run a command; any exit status is accepted."""
        raise NotImplementedError

    def succeed(self, command: str, *, timeout_s: float | None = None, stdin: bytes = b"") -> str:
        """Run a command that must exit with status 0; return stdout without its last newline.

        Raises:
            ContractError: it failed.
        """
        result = require_success(self.run(command, timeout_s=timeout_s, stdin=stdin))
        return result.stdout.removesuffix("\n")

    def fail(
        self, command: str, *, timeout_s: float | None = None, stdin: bytes = b""
    ) -> CommandResult:
        """Run a command that must exit with a status other than 0.

        Raises:
            ContractError: it succeeded.
        """
        result = require_valid(self.run(command, timeout_s=timeout_s, stdin=stdin))
        if not result.status:
            raise ContractError(f"{outcome(result)}, expected it to fail")
        return result

    @timesheet.during("waits")
    def wait_until(self, command: str, *, timeout_s: float = 10.0) -> str:
        """Repeat a command in the guest, in one round trip, until it succeeds; return its output.

        Raises:
            ContractError: it still fails after `timeout_s`.
        """
        loop = (
            "end=$(( $(cut -d. -f1 /proc/uptime) + $1 )); "
            'until out=$(sh -c "$2" 2>&1); status=$?; case $status in 0|126|127) ;; *) status=99; '
            # Repeated by the guest itself: 20 ms between two attempts cost nothing there.
            "[ $(cut -d. -f1 /proc/uptime) -ge $end ];; esac; do sleep 0.02; done; "
            'printf "%s\\n" "$out"; exit $status'
        )
        line = shlex.join(["sh", "-c", loop, "wait_until", str(int(timeout_s) + 1), command])
        result = require_valid(self.run(line, timeout_s=timeout_s * 2 + 10))
        if result.status:
            raise ContractError(
                f"`{command}` still fails after {timeout_s:g} s; its output:\n"
                f"{quoted(result.stdout)}"
            )
        return result.stdout.removesuffix("\n")

    def put(self, data: bytes | Path, target: str, *, mode: int = 0o644) -> None:
        """Write a file in the guest, byte for byte.

        Args:
            data: the content, or a file of the host.
            target: the path in the guest; its folder must exist.
            mode: the file's permissions.
        """
        content = data.read_bytes() if isinstance(data, Path) else data
        path = shlex.quote(target)
        self.succeed(f"cat > {path} && chmod {mode:o} {path}", stdin=content)

    def get(self, path: str) -> bytes:
        """Read a file of the guest, byte for byte."""
        return require_success(self.run(f"cat -- {shlex.quote(path)}")).stdout_bytes
