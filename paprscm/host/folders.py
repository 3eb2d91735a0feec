# SPDX-License-Identifier: GPL-2.0-or-later
"""Folders in which programs can be built and run."""

from __future__ import annotations

import os
import re
from pathlib import Path

from paprscm.errors import ConfigError

_HINT = "set cache_dir to a folder that can"


def require_make(folder: Path) -> None:
    """Raise ConfigError unless a kernel or QEMU can be built below the folder.

    Both reject blanks and colons (Makefile, configure). The kernel's Makefile treats % as a
    pattern, and does not quote paths for the shell.
    """
    _require(folder, r"[^\w./,+=@~-]", "hold a build")


def require_loader(folder: Path) -> None:
    """Raise ConfigError unless a program and its own libraries can run below the folder.

    ld.so(8), --library-path: colons and semicolons are separators, $ begins a token.
    """
    _require(folder, r"[:;$]", "hold a fetched QEMU")


def _require(folder: Path, forbidden: str, use: str) -> None:
    folder = folder.absolute()
    if match := re.search(forbidden, str(folder)):
        raise ConfigError(f"{folder} cannot {use}: its path has a {match[0]!r}", hint=_HINT)
    # The folder may not exist yet.
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if os.statvfs(place).f_flag & os.ST_NOEXEC:
        raise ConfigError(f"{folder} cannot {use}: {place} is mounted noexec", hint=_HINT)
