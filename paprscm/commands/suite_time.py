# SPDX-License-Identifier: GPL-2.0-or-later
"""Time of a job's test slots: the tests' activities, Avocado's part, and idle slots."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from rich import box
from rich.table import Table

from paprscm.commands.series import Series
from paprscm.results.record import Test
from paprscm.timesheet import ACTIVITIES, REST

AVOCADO: Final = "Avocado"
UNRECORDED: Final = "no record"
JOB_START: Final = "job start"
JOB_END: Final = "job end"
IDLE: Final = "idle"
_TITLES: Final = {
    "set-up": "set-up of tests",
    "starts": "starts",
    "DIMMs": "DIMMs (pmem.c)",
    "tools": "guest tools",
    "waits": "waits",
    "commands": "other commands",
    REST: "rest of tests",
    AVOCADO: "Avocado, in tasks",
    UNRECORDED: "killed tests",
    JOB_START: "before first test",
    JOB_END: "after last test",
    IDLE: "idle between them",
}
# Dimensions of series whose times can be compared; kernel and QEMU may differ.
_SAME: Final = ("tests", "side_by_side", "cpus", "accel", "page_size")


@dataclass(frozen=True)
class JobTime:
    """Time of a job's slots; a slot runs one test after the other.

    Attributes:
        seconds: by activity, and for REST, AVOCADO, UNRECORDED, JOB_START, JOB_END and IDLE. The
            sum is the job's duration times the number of slots.
        counts: number of activities.
        cpu_s: CPU time of the tests and their QEMUs.
        unrecorded: tests that ended without a record: a killed test has none.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    cpu_s: float = 0.0
    unrecorded: tuple[str, ...] = ()


def account(tests: Sequence[Test], began_s: float, ended_s: float, slots: int) -> JobTime:
    """Account the time of a job.

    Args:
        tests: the tests of its record.
        began_s, ended_s: start and end of the job by the clock of its tests, time.monotonic().
        slots: number of concurrent tests.
    """
    seconds = dict.fromkeys((*ACTIVITIES, REST, AVOCADO, UNRECORDED), 0.0)
    counts: Counter[str] = Counter(dict.fromkeys(ACTIVITIES, 0))
    unrecorded, cpu_s = [], 0.0
    for test in tests:
        if test.times is None:
            continue
        if not test.times.activities:
            seconds[UNRECORDED] += test.times.duration_s
            unrecorded.append(test.id)
            continue
        for name, spent_s in test.times.activities.items():
            seconds[name] += spent_s
        seconds[AVOCADO] += test.times.duration_s - sum(test.times.activities.values())
        counts.update(test.times.counts)
        cpu_s += test.times.cpu_s or 0.0
    times = [test.times for test in tests if test.times is not None]
    starts = [time.began_s for time in times] or [began_s]
    ends = [time.began_s + time.duration_s for time in times] or [ended_s]
    seconds[JOB_START] = (min(starts) - began_s) * slots
    seconds[JOB_END] = (ended_s - max(ends)) * slots
    seconds[IDLE] = (ended_s - began_s) * slots - sum(seconds.values())
    return JobTime(seconds=seconds, counts=dict(counts), cpu_s=cpu_s, unrecorded=tuple(unrecorded))


def time_values(mode: str, jobs: Sequence[JobTime]) -> dict[str, list[float]]:
    """Values of a series: the times of a mode's jobs, by measurement."""
    values = {
        f"{mode} {name}": [round(job.seconds[name], 3) for job in jobs] for name in jobs[0].seconds
    }
    return {**values, f"{mode} CPU": [round(job.cpu_s, 3) for job in jobs]}


def comparable(series: Series, earlier: Iterable[Series]) -> Series | None:
    """The last earlier series of the same tests on as many CPUs."""
    same = [
        other
        for other in earlier
        if all(other.environment.get(name) == series.environment.get(name) for name in _SAME)
    ]
    return same[-1] if same else None


def time_table(series: Series, before: Series | None) -> Table:
    """The times for a terminal.

    Number and earlier time of an activity are those of the last mode.
    """
    *_, last = modes = list(series.found["modes"])
    counts = series.found["counts"][last][-1]
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), title_justify="left", caption_justify="left"
    )
    table.title = "where the time went, seconds"
    table.add_column(no_wrap=True)
    heads = [head for mode in modes for head in (mode, "%")]
    for head in (*heads, "number", *(["before"] if before else [])):
        table.add_column(head, justify="right", no_wrap=True)

    def row(title: str, *names: str) -> None:
        cells = [title]
        for mode in modes:
            spent_s, total_s = _median(series, mode, names), _median(series, mode, _TITLES)
            share = f"{100 * spent_s / total_s:.0f}" if spent_s and total_s else ""
            cells += [_seconds(spent_s), share]
        cells.append(str(counts.get(names[0], "")) if len(names) == 1 else "")
        if before:
            cells.append(_seconds(_median(before, last, names)))
        table.add_row(*cells)

    jobs = itertools.chain.from_iterable(series.found["unrecorded"].values())
    unrecorded = sorted(set(itertools.chain.from_iterable(jobs)))
    for name, title in _TITLES.items():
        if name != UNRECORDED or unrecorded:
            row(title, name)
    table.add_section()
    row("job x concurrent", *_TITLES)
    row("CPU time of tests", "CPU")
    notes = [f"no record of its time: {name}" for name in unrecorded]
    if before:
        notes.append(f"before: {last} on {time.strftime('%F %T', time.localtime(before.started))}")
    table.caption = "\n".join(notes) or None
    return table


def _seconds(spent_s: float | None) -> str:
    return "" if spent_s is None else f"{spent_s:.1f}"


def _median(series: Series, mode: str, names: Iterable[str]) -> float | None:
    """Median of the sums of measurements; None: the series lacks one."""
    values = [series.values.get(f"{mode} {name}") for name in names]
    known = [column for column in values if column is not None]
    if len(known) < len(values):
        return None
    return statistics.median(map(sum, zip(*known, strict=True)))
