# SPDX-License-Identifier: GPL-2.0-or-later
"""Identity, summary and selection of runs."""

from __future__ import annotations

from dataclasses import dataclass

from paprscm.results.record import Environment, Record


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run in the list of runs.

    Attributes:
        id: see run_id().
        started_s: seconds since the epoch.
        source: the folder that was imported.
        is_complete: the job has ended, it was not killed.
        kernel: release of the guests' kernel; "" without one.
        qemu: version.
        host: CPU and cores.
        suite: version and commit.
        statuses: number of tests by status.
    """

    id: str
    started_s: float
    source: str
    is_complete: bool
    kernel: str
    qemu: str
    host: str
    suite: str
    statuses: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Selects runs; each condition that is given must hold.

    Attributes:
        since_s: started then or later, seconds since the epoch.
        until_s: started before.
        kernel: beginning of the kernel's release.
        qemu: beginning of QEMU's version.
        host: a part of the host's description.
        last: only so many, the latest ones.
    """

    since_s: float | None = None
    until_s: float | None = None
    kernel: str = ""
    qemu: str = ""
    host: str = ""
    last: int | None = None


ALL = Filter()


def run_id(record: Record) -> str:
    """Identity of a run: its job's id and start. Importing it twice is importing it once.

    Avocado's ids are random, but `--force-job-id` gives two jobs the same.
    """
    return f"{record.job.id}@{record.job.start}"


def main_environment(record: Record) -> Environment | None:
    """The environment of most tests; one with a kernel comes first."""
    keys = [test.environment for test in record.tests if test.environment is not None]
    ranks = [(record.environments[k].kernel is not None, keys.count(k), k) for k in set(keys)]
    return record.environments[max(ranks)[2]] if ranks else None
