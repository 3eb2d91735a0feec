# SPDX-License-Identifier: GPL-2.0-or-later
"""The metrics of a run, as one number each: the median of its repetitions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from paprscm.results.labels import metric_label
from paprscm.results.record import Metric, Record

_OF_EVERY_TEST: Final = ("guest_start",)
"""Metrics that the library records in each test: one metric of the run, over its tests."""
_TIMES: Final = ("s", "ms", "us", "ns")
_AMOUNTS: Final = ("KiB", "MiB", "GiB")
_MINIMUM: Final = 0.03
_MINIMUM_OF_COUNT: Final = 0.10
_NOISY: Final = ("longest", "slowest", "memory")
"""Words in names of metrics with one value a run, which are noisier than a median of many."""
_MINIMUM_OF_NOISY: Final = 0.10
_LARGEST: Final = 1e100
"""Largest number of a metric; the squares of larger ones would overflow."""
REFERENCE: Final = "reference"
"""Name of the metric of a run that measures the speed of its host."""


@dataclass(frozen=True, order=True)
class Key:
    """Identity of a metric in all runs.

    Attributes:
        test: name of the test; "" for a metric of the whole run.
        label: name and dimensions.
        unit: unit.
        name: without the dimensions.
    """

    test: str
    label: str
    unit: str
    name: str

    @property
    def direction(self) -> int:
        """-1: less is better, 1: more is better, 0: neither."""
        if self.unit in _TIMES or self.unit in _AMOUNTS:
            return -1
        return 1 if self.unit.endswith("/s") else 0

    @property
    def minimum(self) -> float:
        """The smallest relative change that matters."""
        if any(word in self.name for word in _NOISY):
            return _MINIMUM_OF_NOISY
        return _MINIMUM if self.direction else _MINIMUM_OF_COUNT


def run_medians(records: Sequence[Record]) -> dict[Key, list[float | None]]:
    """The metrics of runs.

    A test that failed does not count: it may have been cut short. A metric of all tests counts for
    the tests that all runs have. Numbers beyond 1e100 do not count.

    Returns:
        By metric, its median in each run; None for a run without it.
    """
    passed = [{t.name for t in r.tests if t.status in ("PASS", "WARN")} for r in records]
    common = set.intersection(*passed) if passed else set()
    medians: dict[Key, list[float | None]] = {}
    for number, record in enumerate(records):
        values: dict[Key, list[float]] = {}
        for test in record.tests:
            if test.name in passed[number]:
                for metric in test.metrics:
                    if abs(metric.value) > _LARGEST:
                        continue
                    key = _key(test.name, metric)
                    if key.test or test.name in common:
                        values.setdefault(key, []).append(metric.value)
        for key, own in values.items():
            medians.setdefault(key, [None] * len(records))[number] = statistics.median(own)
    return medians


def normalized(
    medians: Mapping[Key, Sequence[float | None]], reference: Key
) -> dict[Key, list[float | None]]:
    """Times and rates as multiples of a time or rate of the same run.

    Args:
        medians: returned by run_medians().
        reference: one of its metrics; positive in all runs.
    """
    own = [value or math.nan for value in medians[reference]]
    # The numbers keep their size.
    slowness = [value / statistics.median(own) for value in own]
    if reference.unit not in _TIMES:
        slowness = [1 / value for value in slowness]
    result: dict[Key, list[float | None]] = {}
    for key, values in medians.items():
        # Of a time, 1 / slowness; of a rate, slowness.
        power = 0 if key == reference else -1 if key.unit in _TIMES else key.unit.endswith("/s")
        pairs = zip(values, slowness, strict=True)
        result[key] = [None if v is None else v * factor**power for v, factor in pairs]
    return result


def find_reference(medians: Iterable[Key], name: str) -> list[Key]:
    """The metrics with this name or label whose unit is that of a time or a rate."""
    return [
        key
        for key in sorted(medians)
        if name in (key.name, key.label) and (key.unit in _TIMES or key.unit.endswith("/s"))
    ]


def _key(test: str, metric: Metric) -> Key:
    own = "" if metric.name in _OF_EVERY_TEST else test
    return Key(own, metric_label(metric), metric.unit, metric.name)
