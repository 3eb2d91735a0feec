# SPDX-License-Identifier: GPL-2.0-or-later
"""Cross compiler and binutils for ppc64le, and compiled C programs in the cache."""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from paprscm.errors import HostError
from paprscm.host.cache import Cache
from paprscm.host.process import run

PREFIX = "powerpc64le-linux-gnu-"
"""Prefix of the cross tools; CROSS_COMPILE of a kernel build."""

KERNEL_TOOLS = ("make", "gcc", "bison", "flex", "bc")
"""Other host tools of a kernel build."""

_PACKAGES = {
    "cc": "gcc libc-dev",
    "git": "git",
    "patch": "patch",
    "ninja": "ninja-build",
    "pkg-config": "pkg-config",
    f"{PREFIX}gcc": "gcc-powerpc64le-linux-gnu",
    f"{PREFIX}as": "binutils-powerpc64le-linux-gnu",
    f"{PREFIX}ld": "binutils-powerpc64le-linux-gnu",
    **dict.fromkeys(KERNEL_TOOLS, "make gcc libc6-dev bison flex bc"),
}


def require_program(program: str) -> str:
    """Return the path of a tool that a build needs.

    Raises:
        HostError: it is not installed; the hint names its package.
    """
    path = shutil.which(program)
    if path is None:
        raise HostError(f"{program} is not installed", hint=f"apt install {_PACKAGES[program]}")
    return path


def compile_c(
    cache: Cache,
    kind: str,
    sources: Sequence[Path],
    *,
    compiler: str,
    flags: str,
    headers: Mapping[str, str] | None = None,
) -> Path:
    """Compile and link a program or a library, unless the cache has it.

    Args:
        cache: the cache for the result.
        kind: kind of the cache entry.
        sources: C and assembler files, in link order.
        compiler: "cc", or PREFIX + "gcc".
        flags: separated by blanks.
        headers: content of generated headers, by name.

    Returns:
        The path of the program or library.

    Raises:
        HostError: the compiler is missing or fails.
    """
    headers = headers or {}
    program = require_program(compiler)
    content = b"".join(source.read_bytes() for source in sources)
    content += "".join(headers.values()).encode()
    fields = {
        "output": kind,
        "source": hashlib.sha256(content).hexdigest(),
        "flags": flags,
        "compiler": run([program, "--version"], timeout_s=30).lines[0],
        "arch": platform.machine(),
    }

    def build(folder: Path) -> None:
        for name, text in headers.items():
            (folder / name).write_text(text)
        words: list[str | Path] = [program, *flags.split(), "-I", folder]
        run([*words, "-o", folder / kind, *sources], timeout_s=120)

    return cache.ensure(kind, fields, build).path / kind
