# SPDX-License-Identifier: GPL-2.0-or-later
"""Measurements that print medians and keep a series; they have no verdict of their own."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from paprscm import log
from paprscm.environment import Environment
from paprscm.guest import Guest
from paprscm.machine import Machine

# From QEMU's exec to each of them.
_MARKS = {
    "banner": "kernel banner",
    "init": "/init runs",
    "ready": "ssh server listens",
    "ssh": "ssh connected",
    "command": "first command answered",
}


@dataclasses.dataclass(frozen=True)
class Series:
    """What was measured several times, with what it was measured on.

    Attributes:
        environment: the dimensions.
        started: when, seconds since 1970.
        unit: that of the values.
        values: by what was measured, in the order of the rounds.
    """

    environment: dict[str, str]
    started: float
    unit: str
    values: dict[str, list[float]]

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, minimum, maximum and quartiles of each."""
        return {mark: _spread(values) for mark, values in self.values.items()}

    def as_json(self) -> str:
        """One line: the figures, their summary and their dimensions."""
        return json.dumps({**dataclasses.asdict(self), "summary": self.summary()}, sort_keys=True)


def cold_starts(environment: Environment, count: int, *, warm_up: int = 1) -> Series:
    """Boot `count` guests one after the other, each to its first command's answer.

    Args:
        environment: what they are made of.
        count: how many starts are counted.
        warm_up: starts before those, which fill the host's page cache.
    """
    seconds: dict[str, list[float]] = {mark: [] for mark in _MARKS}
    began = time.time()
    machine = environment.furnish(Machine())
    with log.quiet(), log.progress("cold starts", count, "starts") as bar:
        for number in range(-warm_up, count):
            times = _start_once(environment, machine)
            if number < 0:
                continue
            for mark, value in times.items():
                seconds[mark].append(value)
            bar.update(number + 1)
    return Series(environment.describe(), began, "s", seconds)


def keep(series: Series, file: Path) -> None:
    """Append a series to a file of JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(series.as_json() + "\n")


def table(series: Series) -> Table:
    """The series for a terminal."""
    count = len(next(iter(series.values.values())))
    shown = Table(title=f"{count} cold starts, seconds after QEMU's exec", title_justify="left")
    shown.add_column("reached")
    for name in ("median", "min", "max", "middle half"):
        shown.add_column(name, justify="right")
    for mark, spread in series.summary().items():
        shown.add_row(
            _MARKS[mark],
            f"{spread['median']:.2f}",
            f"{spread['min']:.2f}",
            f"{spread['max']:.2f}",
            f"{spread['p25']:.2f}-{spread['p75']:.2f}",
        )
    return shown


def _start_once(environment: Environment, machine: Machine) -> Mapping[str, float]:
    with tempfile.TemporaryDirectory(prefix="paprscm-bench-") as folder:
        began = time.monotonic()
        with Guest(environment.equipment, machine, folder=Path(folder)) as guest:
            answered = guest.run("true")
            times: dict[str, Any] = dataclasses.asdict(guest.times)
            times["command"] = times["ssh"] + answered.duration_s
        log.logger.debug("start and end: %.2f s", time.monotonic() - began)
    return times


def _spread(values: Sequence[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "p25": quartiles[0],
        "p75": quartiles[2],
    }
