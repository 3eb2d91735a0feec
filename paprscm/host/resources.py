# SPDX-License-Identifier: GPL-2.0-or-later
"""Number of tests that this machine can run concurrently, and the limit that decides it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from paprscm.settings import Settings

TESTS_PER_CPU = 1.0
"""A guest of two vCPUs keeps more than one core busy while it boots; then its test mostly waits."""
QEMU_MIB = 200
"""Memory of a QEMU in addition to its guest's: its own, and TCG's translated code."""
HOST_MIB = 512
"""Memory left to the host."""


@dataclass(frozen=True)
class Resources:
    """CPUs and memory that this process may use.

    Attributes:
        cpus: how many; a quota need not be a whole number.
        available_mib: memory that can be had without swapping.
        cpus_from: the file of a cgroup that allows fewer CPUs than there are, or "".
        memory_from: the file of a cgroup that leaves less memory than the machine has, or "".
    """

    cpus: float
    available_mib: int
    cpus_from: str = ""
    memory_from: str = ""

    @property
    def cpus_text(self) -> str:
        """For a person: "2 CPUs"."""
        return f"{self.cpus:g} CPU{'' if self.cpus == 1 else 's'}{_by(self.cpus_from)}"

    @property
    def memory_text(self) -> str:
        """For a person: "7.8 GiB of memory available"."""
        return f"{_gib(self.available_mib)} of memory available{_by(self.memory_from)}"


@dataclass(frozen=True)
class Budget:
    """Number of tests that run concurrently by default.

    Attributes:
        tests: at least 1.
        fits: whether there is memory for that many.
        reason: what decided, for a person.
    """

    tests: int
    fits: bool
    reason: str


def compute_budget(resources: Resources, settings: Settings) -> Budget:
    """As many tests as the CPUs can run and as the memory can hold guests, but at least one.

    A guest counts as if it touched all of its memory: an idle one takes 222 MiB of the host, but a
    test may fill the guest's page cache. What DIMMs hold does not count: on the host it is page
    cache of files on a disk, and makes room.
    """
    guest_mib = settings.memory_mib + QEMU_MIB
    by_cpus = max(1, int(resources.cpus * TESTS_PER_CPU))
    by_memory = max(0, (resources.available_mib - HOST_MIB) // guest_mib)
    takes = (
        f"{resources.memory_text}, of which the host keeps {_gib(HOST_MIB)} "
        f"and a guest may take {_gib(guest_mib)}"
    )
    if not by_memory:
        return Budget(1, False, f"1, which may not fit: {takes}; set memory_mib to less")
    if by_memory < by_cpus:
        return Budget(by_memory, True, f"{by_memory}: {takes}; CPUs for {by_cpus}")
    each = f"{TESTS_PER_CPU:g} for each of {resources.cpus_text}"
    return Budget(by_cpus, True, f"{by_cpus}: {each}; memory for {by_memory}")


def _gib(mib: int) -> str:
    return f"{mib / 1024:.1f} GiB"


def _by(file: str) -> str:
    return f" (by the cgroup's {file})" if file else ""


def read_resources(root: Path = Path("/")) -> Resources:
    """Measure the usable CPUs (affinity and quota) and memory (of the machine and of the cgroup).

    Args:
        root: where /proc and /sys are.
    """
    groups = list(_cgroups(root))
    cpus: float = len(os.sched_getaffinity(0))
    memory = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    available = int(memory[1]) << 10 if memory else 0
    cpus_from = memory_from = ""
    for quota in _quotas(groups):
        if quota < cpus:
            cpus, cpus_from = quota, "cpu.max"
    for name, left in _memory_left(groups):
        if left < available:
            available, memory_from = left, name
    return Resources(cpus, available >> 20, cpus_from, memory_from)


def _cgroups(root: Path) -> Iterator[Path]:
    """Our cgroup (v2) and those above it that can be seen: the limits of all of them hold."""
    # Without v2 there is no such line, or no such mount: see cgroups(7).
    own = re.search(r"^0::(/.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        if not own or not after.startswith("cgroup2 "):
            continue
        top, point = (Path(word) for word in before.split()[3:5])
        folder = mounted = root / point.relative_to("/")
        # A cgroup outside of what is mounted cannot be seen; one outside of our namespace (/../x)
        # is looked for where nothing is.
        if Path(own[1]).is_relative_to(top):
            folder = mounted / Path(own[1]).relative_to(top)
        yield folder
        while folder != mounted:
            folder = folder.parent
            yield folder
        return


def _quotas(groups: Iterable[Path]) -> Iterator[float]:
    for group in groups:
        if match := re.match(r"(\d+) (\d+)$", _text(group / "cpu.max")):
            yield int(match[1]) / int(match[2])


def _memory_left(groups: Iterable[Path]) -> Iterator[tuple[str, int]]:
    """Name and bytes for each limit: page cache counts as used there, but makes room."""
    for group in groups:
        stat = re.findall(r"^(?:in)?active_file (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
        used = int(_text(group / "memory.current") or 0) - sum(map(int, stat))
        # Above `high` the kernel does not kill: it slows down.
        for name in ("memory.max", "memory.high"):
            limit = _text(group / name)
            if limit.isdecimal():
                yield name, max(0, int(limit) - used)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
