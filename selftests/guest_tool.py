# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest tools compiled on the host, from the same single file that a guest gets."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from paprscm.channel.command import CommandResult, require_success
from paprscm.guest.tools import ToolBinaries, tool_source

FOR_THE_GUEST = "powerpc64le-linux-gnu-gcc"


def compile_on_host(
    name: str,
    target: Path,
    *flags: str,
    compiler: str = "gcc",
    change: Callable[[str], str] | None = None,
) -> Path:
    """Compile guest_tools/NAME.c, optionally changed; skip the test without a compiler."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    source = target.with_name(f"{name}.c")
    text = tool_source(name)
    source.write_text(change(text) if change else text)
    warnings = ["-Wall", "-Wextra", "-Wshadow", "-Werror"]
    subprocess.run([compiler, "-O2", *warnings, *flags, "-o", target, source], check=True)
    source.unlink()
    return target


def is_ppc64le(binary: Path) -> bool:
    """True for ELF, 64 bits, little-endian; e_machine 21 is EM_PPC64."""
    header = binary.read_bytes()[:20]
    return header[:6] == b"\x7fELF\x02\x01" and int.from_bytes(header[18:20], "little") == 21


class HostShell:
    """`run` and `succeed` of a guest, in this machine's shell."""

    def __init__(self) -> None:
        self.tools: ToolBinaries | None = None
        self.commands: list[str] = []

    def run(
        self, command: str, *, timeout_s: float | None = None, stdin: bytes = b""
    ) -> CommandResult:
        self.commands.append(command)
        done = subprocess.run(
            ["/bin/sh", "-c", command], input=stdin, capture_output=True, timeout=60, check=False
        )
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode()
        return CommandResult(command, done.returncode, out, err, done.stdout, 0.0)

    def succeed(self, command: str, *, stdin: bytes = b"") -> str:
        return require_success(self.run(command, stdin=stdin)).stdout
