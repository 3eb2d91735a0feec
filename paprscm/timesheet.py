# SPDX-License-Identifier: GPL-2.0-or-later
"""Time of a test by activity, such as starts, commands and waits; each moment counts once."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

Activity = Literal["set-up", "starts", "DIMMs", "tools", "waits", "commands"]

ACTIVITIES: Final[tuple[Activity, ...]] = (
    *("set-up", "starts", "DIMMs", "tools", "waits", "commands"),
)
"""Finding QEMU, kernel and userland; starts of a QEMU or guest; guest_tools/pmem.c; other guest
tools; deliberate waits; other commands in a guest."""

REST: Final = "rest"
"""Time in no activity."""


def _cpu_s() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Timesheet:
    """Wall-clock time and number of activities, of all threads together.

    If several activities run at a moment, nested or in threads, the moment belongs to the first one
    in the order of ACTIVITIES, so the sum of the times is the wall-clock time. An activity that
    begins during an earlier one of that order is not counted: a command of a tool is a tool.

    Args:
        clock: returns the time, s.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """Begin anew, at the start of a test."""
        with self._lock:
            self._running = dict.fromkeys(ACTIVITIES, 0)
            self._seconds = dict.fromkeys((*ACTIVITIES, REST), 0.0)
            self._counts = dict.fromkeys(ACTIVITIES, 0)
            self._changed = self._clock()
            self._cpu_s = _cpu_s()

    @contextmanager
    def during(self, *activities: Activity) -> Iterator[None]:
        """Count the time of a block, or of a function that this decorates, for activities."""
        self._change(activities, 1)
        try:
            yield
        finally:
            self._change(activities, -1)

    def record(self) -> dict[str, Any]:
        """Seconds and counts by activity, and the CPU time with that of ended children, as JSON."""
        self._change((), 0)
        return {
            "seconds": {name: round(spent, 4) for name, spent in self._seconds.items()},
            "counts": dict(self._counts),
            "cpu_s": round(_cpu_s() - self._cpu_s, 3),
        }

    def _change(self, activities: tuple[Activity, ...], step: int) -> None:
        with self._lock:
            now = self._clock()
            self._seconds[self._current()] += now - self._changed
            self._changed = now
            for name in activities:
                self._running[name] += step
            if step > 0 and (current := self._current()) in activities:
                self._counts[current] += 1

    def _current(self) -> Activity | Literal["rest"]:
        return next((name for name in ACTIVITIES if self._running[name]), REST)


# One for the process, as a logger is: a test has a process of its own.
_OWN: Final = Timesheet()
restart = _OWN.restart
during = _OWN.during
record = _OWN.record


def pause(duration_s: float) -> None:
    """Sleep in a test that has no event to wait for."""
    with during("waits"):
        time.sleep(duration_s)  # Its callers give the reason.
