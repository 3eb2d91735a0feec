# SPDX-License-Identifier: GPL-2.0-or-later
"""Detection of leaks: processes, files, descriptors, threads, and changes of the snapshot."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from paprscm.host.cache import MANIFEST
from paprscm.host.resources import read_resources

# Inherited by all our descendants.
_MARK = "PAPRSCM_LEAKS"
# A thread or a keeper may end a moment after its guest.
_SETTLE_S = 3.0
_STEP_S = 0.02


@dataclass(frozen=True, kw_only=True)
class HeldResources:
    """Resources that a run holds at one moment.

    Attributes:
        processes: names of our descendants, by process id.
        files: files in the scratch folder.
        descriptors: number of open descriptors of this process.
        threads: number of threads of this process.
        own_mib: resident memory of this process.
        available_mib: memory of the host available without swapping.
        load: load average of the host, one minute.
    """

    processes: dict[int, str]
    files: tuple[str, ...]
    descriptors: int
    threads: int
    own_mib: float
    available_mib: int
    load: float


@dataclass(frozen=True, kw_only=True)
class LeakReport:
    """Difference between two moments.

    Attributes:
        before, after: the two moments.
        problems: leaks and changes, each in a few words.
        unchanged: number of compared files without a change.
    """

    before: HeldResources
    after: HeldResources
    problems: tuple[str, ...]
    unchanged: int

    def __str__(self) -> str:
        before, after = self.before, self.after
        text = "; ".join(self.problems) or "no process, no file"
        if self.unchanged and not self.problems:
            text += f", the snapshot's {self.unchanged} files unchanged"
        return (
            f"{'left' if self.problems else 'nothing left'} behind: {text}; "
            f"descriptors {before.descriptors} → {after.descriptors}, "
            f"threads {before.threads} → {after.threads}, "
            f"our memory {before.own_mib:.0f} → {after.own_mib:.0f} MiB, "
            f"the host's available {before.available_mib:,} → {after.available_mib:,} MiB, "
            f"load {before.load:.1f} → {after.load:.1f}"
        )


class LeakWatch:
    """Finds all processes started from now on, by a mark in their environment.

    Args:
        scratch: a folder that must be empty at the end.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._mark = os.environ[_MARK] = uuid.uuid4().hex

    def look(self) -> HeldResources:
        """Read the resources held at the moment."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return HeldResources(
            processes=self.processes(),
            files=tuple(sorted(path.name for path in self._scratch.iterdir())),
            descriptors=len(os.listdir("/proc/self/fd")),  # noqa: PTH208
            threads=len(os.listdir("/proc/self/task")),  # noqa: PTH208
            own_mib=pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20),
            available_mib=read_resources().available_mib,
            load=os.getloadavg()[0],
        )

    def compare(self, before: HeldResources, *, snapshot: Path | None = None) -> LeakReport:
        """Return the leaks since `before`, after a grace period for what needs time to end.

        Args:
            before: the resources at the beginning.
            snapshot: the folder of a cache entry whose files must be unchanged.
        """
        deadline = time.monotonic() + _SETTLE_S
        while True:
            after = self.look()
            problems = _more(before, after)
            if not problems or time.monotonic() >= deadline:
                break
            # The ends of other processes' children cause no event here.
            time.sleep(_STEP_S)
        unchanged = 0
        if snapshot is not None:
            unchanged, changed = check_digests(snapshot)
            problems += [f"the snapshot's {change}" for change in changed]
        return LeakReport(before=before, after=after, problems=tuple(problems), unchanged=unchanged)

    def processes(self) -> dict[int, str]:
        """Living processes with our mark, and all our children."""
        mark = f"{_MARK}={self._mark}".encode()
        processes = {}
        for folder in Path("/proc").glob("[0-9]*"):
            # Processes of other users cannot be read; others may have ended.
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    processes[int(folder.name)] = _command(folder)
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):
                for child in (task / "children").read_text().split():
                    processes.setdefault(int(child), _command(Path("/proc") / child))
        processes.pop(os.getpid(), None)
        return processes


def check_digests(folder: Path) -> tuple[int, list[str]]:
    """Count the files of a cache entry that match its manifest, and name the others."""
    if not (folder / MANIFEST).exists():
        return 0, [f"{MANIFEST} is missing"]
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    changed = []
    for name, sealed in files.items():
        try:
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sealed["sha256"]:
                    changed.append(f"{name} was changed")
        except FileNotFoundError:
            changed.append(f"{name} is missing")
    return len(files) - len(changed), changed


def _more(before: HeldResources, after: HeldResources) -> list[str]:
    problems = []
    if more := after.processes.keys() - before.processes.keys():
        commands = (f"{pid} {after.processes[pid]}" for pid in sorted(more))
        problems.append(f"{_count(more, 'process', 'processes')} ({', '.join(commands)})")
    if names := set(after.files) - set(before.files):
        listed = ", ".join(sorted(names)[:5])
        problems.append(f"{_count(names, 'file', 'files')} in the scratch folder ({listed})")
    for resource in ("descriptors", "threads"):
        was, now = getattr(before, resource), getattr(after, resource)
        if now > was:
            problems.append(f"{now} {resource} instead of {was}")
    return problems


def _count(things: Iterable[object], one: str, many: str) -> str:
    number = len(list(things))
    return f"{number} {one if number == 1 else many}"


def _command(folder: Path) -> str:
    return (folder / "comm").read_text().strip()
