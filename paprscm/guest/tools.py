# SPDX-License-Identifier: GPL-2.0-or-later
"""Compile and run guest tools in the guest."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath

from paprscm.guest.command import TOOLS_FOLDER, CommandResult, TimedOutError
from paprscm.guest.guest import Guest
from paprscm.guest.report import ProbeError
from paprscm.paths import GUEST_TOOLS

_SOURCES = GUEST_TOOLS
_INCLUDE = '#include "report.h"\n'
_GCC = "gcc -O2 -Wall -Wextra -Werror"
_GCC_LIMIT_S = 120.0
# No tool exits with this status (guest_tools/report.h).
_NOT_BUILT = 70

TOOLS = ("map_sync", "promise", "faults", "flush", "persist", "same_block")
"""Tools that are compiled before a snapshot is made, so that restored guests have them."""


def compile_tool(guest: Guest, name: str) -> PurePosixPath:
    """Compile guest_tools/NAME.c in the guest unless the binary exists; return its path there.

    Raises:
        ProbeError: the tool does not exist, or does not compile, or not within 120 s.
    """
    content, target = _tool(name)
    base = shlex.quote(str(target))
    try:
        result = guest.run(
            f"[ -x {base} ] && {{ cat > /dev/null; exit; }}\n"
            f"mkdir -p {TOOLS_FOLDER} && cat > {base}.$$.c && {_GCC} -o {base}.$$ {base}.$$.c "
            f"&& mv {base}.$$ {base} && rm {base}.$$.c",
            stdin=content,
            timeout_s=_GCC_LIMIT_S,
        )
    except TimedOutError as error:
        # gcc uses no DIMM, so only a busy host makes it slow.
        raise ProbeError(
            f"gcc in the guest did not compile guest_tools/{name}.c within {_GCC_LIMIT_S:g} s",
            hint="run fewer tests concurrently, or use an idle host",
        ) from error
    if result.status:
        raise ProbeError(
            f"guest_tools/{name}.c does not compile in the guest (status {result.status}):\n"
            f"{result.stderr.strip()}"
        )
    return target


def tools_digest(*names: str) -> str:
    """Return the digest of these tools' sources and of the compiler command."""
    targets = " ".join(str(_tool(name)[1]) for name in names)
    return hashlib.sha256(f"{_GCC} {targets}".encode()).hexdigest()


def run_tool(guest: Guest, name: str, words: Sequence[str]) -> CommandResult:
    """Run a tool in the guest; compile it first if needed."""
    binary = str(_tool(name)[1])
    command = f"[ -x {binary} ] || exit {_NOT_BUILT}\n{shlex.join([binary, *words])}"
    result = guest.run(command)
    if result.status == _NOT_BUILT:
        compile_tool(guest, name)
        result = guest.run(command)
    return result


def tool_source(name: str) -> str:
    """Return guest_tools/NAME.c as one file, with report.h in place of its #include.

    Raises:
        ProbeError: the file cannot be read.
    """
    try:
        text = (_SOURCES / f"{name}.c").read_text()
        before, include, after = text.partition(_INCLUDE)
        if include:
            header, line = (_SOURCES / "report.h").read_text(), before.count("\n") + 2
            text = f'{before}#line 1 "report.h"\n{header}#line {line} "{name}.c"\n{after}'
    except OSError as error:
        raise ProbeError(f"{error.filename}: {error.strerror}") from error
    return text


def _tool(name: str) -> tuple[bytes, PurePosixPath]:
    """Return a tool's source and the path of its binary in the guest, which contains its digest."""
    content = tool_source(name).encode()
    return content, TOOLS_FOLDER / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
