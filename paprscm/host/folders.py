# SPDX-License-Identifier: GPL-2.0-or-later
"""Folders in which programs can be built and run."""

from __future__ import annotations

import os
import re
from pathlib import Path

from paprscm.errors import ConfigError

_HINT = "set cache_dir to a folder that can"


def require_make(folder: Path) -> None:
    """Raise ConfigError unless the kernel can be built below the folder.

    Its Makefile refuses blanks and colons, takes % for a pattern, and quotes no path for the shell.
    """
    _require(folder, r"[^\w./,+=@~-]", "hold a kernel build")


def require_loader(folder: Path) -> None:
    """Raise ConfigError unless a program and its own libraries can run below the folder.

    ld.so(8), --library-path: colons and semicolons separate, $ begins a token.
    """
    _require(folder, r"[:;$]", "hold a fetched QEMU")


def _require(folder: Path, forbidden: str, use: str) -> None:
    folder = folder.absolute()
    if found := re.search(forbidden, str(folder)):
        raise ConfigError(f"{folder} cannot {use}: its path has a {found[0]!r}", hint=_HINT)
    # It may not be there yet.
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if os.statvfs(place).f_flag & os.ST_NOEXEC:
        raise ConfigError(f"{folder} cannot {use}: {place} is mounted noexec", hint=_HINT)
