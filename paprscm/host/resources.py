# SPDX-License-Identifier: GPL-2.0-or-later
"""Number of tests that this machine can run concurrently, and the resource that limits it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from paprscm.settings import Settings

TESTS_PER_CPU = 1.0
"""A guest of two vCPUs needs more than one core while it boots; then its test mostly waits."""
QEMU_MIB = 200
"""Memory of a QEMU beyond its guest's: its own data, and TCG's translated code."""
HOST_MIB = 512
"""Memory reserved for the host."""


@dataclass(frozen=True)
class Resources:
    """CPUs and memory that this process may use.

    Attributes:
        cpus: number of CPUs; a quota may be fractional.
        available_mib: memory available without swapping.
        cpus_from: cgroup file whose quota is below the number of CPUs, or "".
        memory_from: cgroup file whose limit is below the machine's available memory, or "".
    """

    cpus: float
    available_mib: int
    cpus_from: str = ""
    memory_from: str = ""

    @property
    def cpus_text(self) -> str:
        """Description, such as "2 CPUs"."""
        return f"{self.cpus:g} CPU{'' if self.cpus == 1 else 's'}{_by(self.cpus_from)}"

    @property
    def memory_text(self) -> str:
        """Description, such as "7.8 GiB of memory available"."""
        return f"{_gib(self.available_mib)} of memory available{_by(self.memory_from)}"


@dataclass(frozen=True)
class Budget:
    """Number of tests that run concurrently by default.

    Attributes:
        tests: at least 1.
        fits: there is enough memory for them.
        reason: the limiting resource, for a person.
    """

    tests: int
    fits: bool
    reason: str


def compute_budget(resources: Resources, settings: Settings) -> Budget:
    """Number of tests that CPUs and memory allow, at least one.

    A guest counts with all of its memory: an idle guest takes 222 MiB of the host, but a test may
    fill the guest's page cache. The content of DIMMs does not count: on the host it is reclaimable
    page cache.
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
    """Read the usable CPUs (affinity and quota) and memory (of the machine and of the cgroup).

    Args:
        root: parent folder of /proc and /sys.
    """
    groups = list(_cgroups(root))
    cpus: float = len(os.sched_getaffinity(0))
    memory = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    available = int(memory[1]) << 10 if memory else 0
    cpus_from = memory_from = ""
    for quota in _quotas(groups):
        if quota < cpus:
            cpus, cpus_from = quota, "cpu.max"
    for name, free_bytes in _available_bytes(groups):
        if free_bytes < available:
            available, memory_from = free_bytes, name
    return Resources(cpus, available >> 20, cpus_from, memory_from)


def _cgroups(root: Path) -> Iterator[Path]:
    """Our cgroup (v2) and its visible ancestors, whose limits apply, too."""
    # Without cgroup v2 the line or the mount does not exist: see cgroups(7).
    own = re.search(r"^0::(/.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        if not own or not after.startswith("cgroup2 "):
            continue
        top, point = (Path(word) for word in before.split()[3:5])
        folder = mounted = root / point.relative_to("/")
        # A cgroup outside the mount is not visible; the path of one outside our namespace (/../x)
        # does not exist.
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


def _available_bytes(groups: Iterable[Path]) -> Iterator[tuple[str, int]]:
    """Name of each limit, and bytes below it; page cache does not count, it is reclaimable."""
    for group in groups:
        stat = re.findall(r"^(?:in)?active_file (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
        used = int(_text(group / "memory.current") or 0) - sum(map(int, stat))
        # Above `high` the kernel throttles instead of killing.
        for name in ("memory.max", "memory.high"):
            limit = _text(group / name)
            if limit.isdecimal():
                yield name, max(0, int(limit) - used)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
