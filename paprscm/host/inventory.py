# SPDX-License-Identifier: GPL-2.0-or-later
"""Description of this machine and of the suite's version, for the record of a job."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from pathlib import Path

from paprscm.errors import Error
from paprscm.host import process
from paprscm.paths import ROOT
from paprscm.results.record import Host, Suite


def describe_host(root: Path = Path("/")) -> Host:
    """CPU, memory, kernel and distribution of this machine.

    Args:
        root: parent folder of /proc and /etc.
    """
    cpu = _line(root / "proc/cpuinfo", r"(?:model name|cpu)\s*: (.+)")
    total = _line(root / "proc/meminfo", r"MemTotal:\s+(\d+) kB")
    release = _line(root / "etc/os-release", r"PRETTY_NAME=(.+)")
    return Host(
        cpu=cpu or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_mib=int(total or 0) >> 10,
        machine=platform.machine(),
        kernel=platform.release(),
        distribution=(release or "unknown").strip("\"'"),
    )


def describe_suite(folder: Path = ROOT) -> Suite:
    """Version and git commit of the suite.

    Args:
        folder: the checkout.
    """
    commit = None
    modified = False
    if (folder / ".git").exists() and shutil.which("git"):
        git = ["git", "-c", f"safe.directory={folder}", "-C", str(folder)]
        try:
            commit = process.run([*git, "rev-parse", "HEAD"]).text
            status = [*git, "status", "--porcelain", "--untracked-files=no"]
            modified = bool(process.run(status).text)
        except Error:
            # No commit yet, or a damaged checkout.
            pass
    return Suite(version=importlib.metadata.version("paprscm"), commit=commit, modified=modified)


def _line(file: Path, pattern: str) -> str | None:
    try:
        match = re.search(rf"^{pattern}$", file.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return match[1].strip() if match else None
