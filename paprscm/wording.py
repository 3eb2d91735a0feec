# SPDX-License-Identifier: GPL-2.0-or-later
"""How DIMMs, commands and their output read in a message or a log."""

from __future__ import annotations

from paprscm import log
from paprscm.errors import HostError
from paprscm.machine import Nvdimm
from paprscm.ssh import CommandResult


def in_words(nvdimm: Nvdimm) -> str:
    """What a DIMM is: "slot 0: spapr-nvdimm pmem=on"."""
    return (
        f"slot {nvdimm.slot}: {nvdimm.device}"
        + (" pmem=on" if nvdimm.pmem else " pmem=off")
        + (" pmem-override=on" if nvdimm.pmem_override else "")
    )


def log_command(result: CommandResult) -> None:
    """Keep a command, its status and duration, and its output in the test's log."""
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
    """A command, its status and its output, for an error."""
    return (
        f"`{result.command}` ended with status {result.status}\n  stdout:\n"
        f"{quoted(result.stdout)}\n  stderr:\n{quoted(result.stderr)}"
    )


def reporting(result: CommandResult) -> CommandResult:
    """The same result, if it may say something about the kernel under test.

    Raises:
        HostError: a program is missing in the userland, or crashed.
    """
    if result.tool_failure:
        raise HostError(f"{result.tool_failure}: {outcome(result)}")
    return result


def quoted(text: str, *, last: int = 20) -> str:
    """The last lines of an output, indented, without what a terminal would obey."""
    clean = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return "\n".join(f"    {line}" for line in clean.splitlines()[-last:]) or "    (nothing)"
