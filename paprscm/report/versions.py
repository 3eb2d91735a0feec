# SPDX-License-Identifier: GPL-2.0-or-later
"""Comparison of the newest kernel or QEMU with the one before, in each place of the runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from paprscm.errors import ConfigError
from paprscm.history.comparison import Comparison, MetricResult, compare
from paprscm.history.conditions import NEVER_COMPARED, conditions, differences, subjects
from paprscm.history.runs import run_id
from paprscm.history.statistics import enough
from paprscm.report.metrics import place_names
from paprscm.report.runs import Run, changes
from paprscm.results.labels import safe

RUNS: Final = 12
"""Runs that are compared at most, the newest ones, half of each version if there are as many. For
200 metrics of 6 + 6 runs, a comparison takes 0.1 s; of 10 + 10 runs, 1 s."""
_SUITE: Final = "suite"
"""Condition that may differ within a set and between sets; a difference is a warning."""

Conditions = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Two sets of runs in one place, with different kernels or QEMUs.

    Attributes:
        place: name of the track, and of the host if there are several.
        a: the runs of the earlier version, in chronological order.
        b: the runs of the newer version.
        differences: conditions that differ, with their values.
        found: their comparison; None if they are not comparable.
        obstacles: reasons why they are not.
        command: of the terminal, for the same comparison.
    """

    place: str
    a: tuple[Run, ...]
    b: tuple[Run, ...]
    differences: dict[str, tuple[str, str]]
    found: Comparison | None
    obstacles: tuple[str, ...]
    command: str

    @property
    def title(self) -> str:
        """The change of the versions, in a few words."""
        words = changes(self.a[-1], self.b[-1], "")
        return "; ".join(w for w in words if w.startswith(("Linux ", "QEMU "))) or "another build"

    @property
    def changed(self) -> list[MetricResult]:
        """The metrics that changed."""
        return [metric for metric in self.found.metrics if metric.change] if self.found else []

    @property
    def is_alternating(self) -> bool:
        """The runs of one version are not all before those of the other."""
        return self.a[-1].number > self.b[0].number


def versions(runs: Sequence[Run]) -> list[Versions]:
    """The newest pair of each place, and the newest comparable one if that has too few runs.

    The runs of a set have equal conditions, apart from the suite. The sets of a pair differ in
    the kernel or QEMU, and not in what is never compared.

    Args:
        runs: all runs of the site in chronological order.

    Returns:
        The place with the newest run first; nothing for a place with one version.
    """
    names = place_names(runs)
    by_place: dict[str, list[Run]] = {}
    for run in reversed(runs):
        by_place.setdefault(names[run], []).append(run)
    return [
        _compared(place, a, b)
        for place, own in by_place.items()
        for a, b in _chosen(_pairs(own[::-1]))
    ]


def command(a: Iterable[Run], b: Iterable[Run]) -> str:
    """The command that compares two sets of stored runs."""
    first, second = (" ".join(short_id(run) for run in runs) for runs in (a, b))
    return f"paprscm compare {first} -- {second}"


def short_id(run: Run) -> str:
    """The beginning of a run's id, as `paprscm history list` prints it; harmless in a shell."""
    return safe(run_id(run.record)[:8])


def _pairs(runs: Sequence[Run]) -> Iterator[tuple[list[Run], list[Run]]]:
    """All pairs of versions, the newest first; the second of a pair has the newer run."""
    sets: dict[Conditions, list[Run]] = {}
    for run in runs:
        own = conditions(run.record)
        own.pop(_SUITE, None)
        sets.setdefault(tuple(sorted(own.items())), []).append(run)
    newest = sorted(sets, key=lambda key: sets[key][-1].number, reverse=True)
    for number, key in enumerate(newest):
        for other in newest[number + 1 :]:
            if _differ_in_a_version(dict(other), dict(key)):
                yield sets[other], sets[key]


def _differ_in_a_version(a: dict[str, str], b: dict[str, str]) -> bool:
    different = [name for name in {**a, **b} if a.get(name, "") != b.get(name, "")]
    causes = subjects(different)
    return not {*NEVER_COMPARED} & {*different} and bool({"kernel", "QEMU"} & {*causes})


def _chosen(
    pairs: Iterable[tuple[list[Run], list[Run]]],
) -> list[tuple[list[Run], list[Run]]]:
    chosen: list[tuple[list[Run], list[Run]]] = []
    for a, b in pairs:
        is_enough = enough(len(a), len(b))
        if is_enough or not chosen:
            chosen.append((a, b))
        if is_enough:
            break
    return chosen


def _compared(place: str, a: Sequence[Run], b: Sequence[Run]) -> Versions:
    size = min(len(b), max(RUNS // 2, RUNS - len(a)))
    a, b = a[size - RUNS :], b[-size:]
    found: Comparison | None = None
    obstacles: tuple[str, ...]
    try:
        found = compare([run.record for run in a], [run.record for run in b])
        obstacles = found.obstacles
    except ConfigError as error:
        obstacles = (error.message,)
    return Versions(
        place=place,
        a=tuple(a),
        b=tuple(b),
        differences=differences(a[0].record, b[0].record),
        found=None if obstacles else found,
        obstacles=obstacles,
        command=command(a, b),
    )
