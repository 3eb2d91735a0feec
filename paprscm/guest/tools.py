# SPDX-License-Identifier: GPL-2.0-or-later
"""Compile guest tools in a guest, once per userland, and run them in guests."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from paprscm.channel.command import (
    TOOLS_FOLDER,
    CommandResult,
    TimedOutError,
    require_success,
)
from paprscm.guest.report import ProbeError
from paprscm.host.cache import Cache
from paprscm.paths import GUEST_TOOLS

if TYPE_CHECKING:
    from paprscm.guest.guest import Guest

KIND = "tool"
# Binaries to keep (100 KB each); every changed tool adds one.
_KEEP = 100
_SOURCES = GUEST_TOOLS
_INCLUDE = '#include "report.h"\n'
_GCC = "gcc -O2 -Wall -Wextra -Werror"
_GCC_LIMIT_S = 120.0
# No tool exits with these (guest_tools/report.h).
_NOT_BUILT, _NOT_PLACED = 70, 71

TOOLS = ("pmem", "map_sync", "promise", "faults", "flush", "persist", "same_block")
"""Tools that are installed before a snapshot is made, so that restored guests have them."""


@dataclass(frozen=True, kw_only=True)
class ToolBinaries:
    """Cached binaries of guest tools, compiled in a guest by the gcc of its userland.

    Attributes:
        cache: keeps the binaries.
        inputs: the part of the key that does not depend on the tool. It has the QEMU and the CPU on
            which gcc ran, but no kernel: guests of all kernels use the same binaries.
    """

    cache: Cache
    inputs: Mapping[str, str]

    def ensure(self, name: str, compiled: Callable[[], bytes]) -> bytes:
        """Return the binary of a tool; `compiled` makes it if it is not cached, or damaged."""

        def build(folder: Path) -> None:
            (folder / name).write_bytes(compiled())

        source = hashlib.sha256(tool_source(name).encode()).hexdigest()
        fields = {"tool": name, "source": source, "compiler": _GCC, **self.inputs}
        entry = self.cache.ensure(KIND, fields, build, keep=_KEEP)
        return (entry.path / name).read_bytes()


def install_tool(guest: Guest, name: str, *, anew: bool = False) -> PurePosixPath:
    """Return the path of a tool in the guest, which has its binary then.

    Args:
        guest: the guest.
        name: the tool, guest_tools/NAME.c.
        anew: compile it in this guest, even if the guest or the cache has its binary.

    Raises:
        ProbeError: as compile_tool(), or gcc makes another binary in this guest than in an earlier
            one.
    """
    target = _tool(name)[1]
    if anew or guest.run(f"[ -x {target} ]").status:
        require_success(guest.run(_place(target), stdin=_binary(guest, name, anew=anew)))
    return target


def _binary(guest: Guest, name: str, *, anew: bool = False) -> bytes:
    """Return the cached binary of a tool, or compile it in the guest."""
    if anew or guest.tools is None:
        binary = compile_tool(guest, name)
    else:
        binary = guest.tools.ensure(name, lambda: compile_tool(guest, name))
    if anew and guest.tools and guest.tools.ensure(name, lambda: binary) != binary:
        raise ProbeError(
            f"gcc made another {name} in this guest than in the one whose binary is in the cache",
            hint=f"compare kernel and QEMU of both; remove {guest.tools.cache.root / KIND}",
        )
    return binary


def _place(target: PurePosixPath) -> str:
    """Shell command that makes a program of its standard input."""
    # By rename: another thread may place the same tool.
    return (
        f"{{ install -D -m 755 /proc/self/fd/0 {target}.$$ && mv {target}.$$ {target}; }} || "
        f"exit {_NOT_PLACED}"
    )


def compile_tool(guest: Guest, name: str) -> bytes:
    """Compile guest_tools/NAME.c in the guest; return the binary.

    The same source and gcc make the same bytes: the binary has no path of the guest.

    Raises:
        ProbeError: the tool does not exist, or does not compile, or not within 120 s.
    """
    content, _target = _tool(name)
    try:
        result = guest.run(
            f"mkdir -p {TOOLS_FOLDER} && folder=$(mktemp -d {TOOLS_FOLDER}/XXXXXX) && "
            f"cd $folder && cat > {name}.c && {_GCC} -o {name} {name}.c && cat {name} && "
            f"cd / && rm -r $folder",
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
    return result.stdout_bytes


def tools_digest(*names: str) -> str:
    """Return the digest of these tools' sources and of the compiler command."""
    targets = " ".join(str(_tool(name)[1]) for name in names)
    return hashlib.sha256(f"{_GCC} {targets}".encode()).hexdigest()


def run_tool(
    guest: Guest, name: str, words: Sequence[str], *, timeout_s: float | None = None
) -> CommandResult:
    """Run a tool in the guest, in one round trip if the guest has it; else in two.

    Args:
        guest: the guest.
        name: the tool, guest_tools/NAME.c.
        words: its arguments.
        timeout_s: time limit, s; None: the setting command_limit_s.

    Raises:
        ProbeError: as install_tool().
    """
    target = _tool(name)[1]
    line = shlex.join([str(target), *words])
    result = guest.run(f"[ -x {target} ] || exit {_NOT_BUILT}\n{line}", timeout_s=timeout_s)
    if result.status == _NOT_BUILT:
        binary = _binary(guest, name)
        result = guest.run(f"{_place(target)}\n{line}", stdin=binary, timeout_s=timeout_s)
        if result.status == _NOT_PLACED:
            require_success(result)
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
