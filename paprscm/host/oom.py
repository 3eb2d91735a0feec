# SPDX-License-Identifier: GPL-2.0-or-later
"""Evidence that the kernel's OOM killer has killed a process."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HINT = "free memory, or run fewer tests concurrently (--max-parallel-tasks)"


@dataclass(frozen=True)
class OomKills:
    """A count of the processes that the OOM killer has killed.

    Attributes:
        source: the file with the counter.
        count: kills since the cgroup was created, or since the kernel started.
    """

    source: Path
    count: int


def read_oom_kills(root: Path = Path("/")) -> OomKills | None:
    """The count of our memory cgroup; if no cgroup has one, that of the machine.

    Args:
        root: parent folder of /proc and /sys.
    """
    for file in _counters(root):
        with contextlib.suppress(OSError):
            if match := re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE):
                return OomKills(file, int(match[1]))
    return None


def evidence(pid: int, before: OomKills | None, root: Path = Path("/")) -> tuple[str, bool]:
    """The facts about a process that SIGKILL ended, and whether they point to the OOM killer.

    Args:
        pid: the process.
        before: the count at its start.
        root: parent folder of /proc, /sys and /dev.
    """
    # In a container the process id differs from that in the kernel's message.
    killed = re.compile(rf"Killed process {pid} \(")
    messages = [text for text in _messages(root / "dev/kmsg") if killed.search(text)]
    now = read_oom_kills(root)
    if before is None or now is None or before.source != now.source:
        count, rose = "the OOM killer's count cannot be read", False
    elif rose := now.count > before.count:
        count = f"the OOM killer's count rose from {before.count} to {now.count} ({now.source})"
    else:
        count = f"the OOM killer's count is still {now.count} ({now.source})"
    return "; ".join([count, *(f"kernel: {text}" for text in messages)]), rose or bool(messages)


def _counters(root: Path) -> Iterator[Path]:
    """The files that may hold the count; see cgroups(7)."""
    groups = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        # In a container the path may be the host's; the container's cgroup is then the root.
        places = (path.lstrip("/"), "")
        if "memory" in controllers.split(","):
            yield from (groups / "memory" / place / "memory.oom_control" for place in places)
        elif not controllers:
            yield from (groups / place / "memory.events" for place in places)
    yield root / "proc/vmstat"


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _messages(kmsg: Path) -> Iterator[str]:
    """The kernel's messages without their prefixes, if we have permission to read them."""
    try:
        handle = os.open(kmsg, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return
    try:
        while True:
            try:
                # One record a call; EPIPE: the record was overwritten.
                records = os.read(handle, 8192)
            except BrokenPipeError:
                continue
            except OSError:
                return
            if not records:
                return
            for line in records.decode(errors="replace").splitlines():
                yield line.partition(";")[2]
    finally:
        os.close(handle)
