# SPDX-License-Identifier: GPL-2.0-or-later
"""Series of measurements with their dimensions, and their summary."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Series:
    """Repeated measurements and the environment in which they were made.

    Attributes:
        environment: the dimensions.
        started: start of the measurement, seconds since the epoch.
        unit: unit of the values.
        values: values by measurement, in the order of the rounds.
        found: other results, with another unit or none.
    """

    environment: dict[str, str]
    started: float
    unit: str
    values: dict[str, list[float]]
    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, minimum, maximum and quartiles of each measurement."""
        return {mark: _spread(values) for mark, values in self.values.items()}

    def as_json(self) -> str:
        """One line of JSON: values, summary and dimensions."""
        return json.dumps({**dataclasses.asdict(self), "summary": self.summary()}, sort_keys=True)


def append_series(series: Series, file: Path) -> None:
    """Append a series to a file of JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(series.as_json() + "\n")


def read_series(file: Path) -> list[Series]:
    """The series of a file, in the order in which they were appended."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [part.name for part in dataclasses.fields(Series)]
    return [Series(*(json.loads(line)[name] for name in names)) for line in lines]


def _spread(values: Sequence[float]) -> dict[str, float]:
    quartiles = [values[0]] * 3
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "p25": quartiles[0],
        "p75": quartiles[2],
    }
