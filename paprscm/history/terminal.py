# SPDX-License-Identifier: GPL-2.0-or-later
"""The history, and comparisons, for a person at a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import count
from statistics import median
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from paprscm.history.comparison import NOISE_UNKNOWN, Comparison, MetricResult
from paprscm.history.runs import Run
from paprscm.history.verdicts import Change, Flaky
from paprscm.results.record import Status
from paprscm.results.tally import ORDER
from paprscm.results.terminal import STYLES
from paprscm.results.text import one_line

_ID = 8
"""Characters of an id that are shown if they are enough."""
_CHANGES: Final = {
    "worse": "bold red",
    "better": "green",
    "changed": "yellow",
    "varies": "dim",
}
_NAMES: Final = 10
"""Names of tests in a list; the others are counted."""
_WIDEST: Final = 120
"""Width of the table of metrics on a wide terminal."""


def runs_table(runs: Sequence[Run], *, wide: bool) -> Table:
    """A row for each run.

    Args:
        runs: in the order of the rows.
        wide: with the columns that need more than 80 characters.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("run", "start (UTC)"):
        table.add_column(name, no_wrap=True)
    for name in ("kernel", "QEMU"):
        table.add_column(name, overflow="fold")
    statuses = [status for status in ORDER if any(run.statuses.get(status) for run in runs)]
    for status in statuses:
        title = "INT" if status == "INTERRUPTED" else status
        table.add_column(Text(title, STYLES[status]), justify="right", no_wrap=True)
    if wide:
        for name in ("host", "suite", "folder"):
            table.add_column(name, overflow="fold")
    ids = short_ids([run.id for run in runs])
    for run in runs:
        start = datetime.fromtimestamp(run.started_s, UTC).strftime("%Y-%m-%d %H:%M")
        cells = [ids[run.id], start, one_line(run.kernel), one_line(run.qemu)]
        cells += [str(run.statuses.get(status) or "") for status in statuses]
        if wide:
            cells += map(one_line, (run.host, run.suite, run.source))
        table.add_row(*map(Text, cells))
    return table


def flaky_table(tests: Sequence[Flaky]) -> Table:
    """A row for each test."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("test", overflow="fold")
    for name in ("changes", "rate", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdicts", overflow="fold")
    for test in tests:
        low, high = test.interval
        statuses = [f"{test.statuses[s]} {s}" for s in reversed(ORDER) if test.statuses[s]]
        table.add_row(
            one_line(test.test),
            f"{test.changes} of {test.pairs}",
            f"{100 * test.changes / test.pairs:.0f} %",
            f"{100 * low:.0f} to {100 * high:.0f} %",
            ", ".join(statuses),
        )
    return table


def short_ids(ids: Sequence[str]) -> dict[str, str]:
    """Beginnings of ids, of equal length, that distinguish them."""
    for length in count(_ID):
        short = {one_line(id_[:length]) for id_ in ids}
        if len(short) == len(set(ids)) or length >= max(map(len, ids), default=0):
            break
    return {id_: one_line(id_[:length]) for id_ in ids}


def print_comparison(console: Console, found: Comparison, *, every_metric: bool) -> None:
    """Print what differs, and the conclusion.

    Args:
        console: the terminal.
        found: returned by compare().
        every_metric: not only those that have changed.
    """
    _print_conditions(console, found)
    if found.verdicts:
        table = _table(console, "Verdicts", "test", "A", "B")
        for verdict in found.verdicts:
            counts = _counts(verdict.a), _counts(verdict.b)
            table.add_row(_change(verdict.change), one_line(verdict.test), *counts)
        console.print(table)
    if found.issues:
        table = _table(console, "Known issues", "issue", "A", "B")
        for issue in found.issues:
            words = {"worse": "new", "better": "gone"}
            name = f"{one_line(issue.name)}: {one_line(issue.title)}"
            rates = (f"{shown} of {total}" for shown, total in (issue.a, issue.b))
            table.add_row(_change(issue.change, words), name, *rates)
        console.print(table)
    _print_metrics(console, [r for r in found.metrics if r.change or every_metric])
    for title, names in (("without a verdict in B", found.gone), ("only in B", found.new)):
        if names:
            console.print(f"\n{len(names)} tests {title}")
            for name in names[:_NAMES]:
                console.print(Text(f"  {one_line(name)}", no_wrap=True, overflow="ellipsis"))
    console.print()
    _print_conclusion(console, found)


def _print_conditions(console: Console, found: Comparison) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("A", f"{_runs(found.a)}")
    grid.add_row("B", f"{_runs(found.b)}")
    for name, (a, b) in found.differences.items():
        grid.add_row(name, f"{a or 'unknown'} → {b or 'unknown'}")
    if not found.differences:
        grid.add_row("", "equal conditions")
    for warning in found.warnings:
        grid.add_row(Text("warning", "yellow"), one_line(warning))
    if found.reference:
        grid.add_row(
            "reference", f"{one_line(found.reference)}: times and rates are relative to it"
        )
    console.print(grid)


def _print_metrics(console: Console, results: Sequence[MetricResult]) -> None:
    """Print the metrics of each test below its name, in columns of equal width."""
    if not results:
        return
    console.print()
    by_test: dict[str, list[MetricResult]] = {}
    for result in results:
        by_test.setdefault(result.test, []).append(result)
    grid = _metrics_grid(console)
    grid.add_row("", Text("Metrics", "bold"), "A", "B", "change [95 % interval]")
    console.print(grid)
    for test, own in by_test.items():
        console.print(Text(one_line(test) or "all tests", "bold", overflow="fold"))
        grid = _metrics_grid(console)
        for result in own:
            values = (_number(median(part), result.unit) for part in (result.a, result.b))
            name = one_line(result.metric)
            grid.add_row(_change(result.change or ""), name, *values, _interval(result))
        console.print(grid)


def _metrics_grid(console: Console) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0), expand=True)
    grid.width = min(console.width, _WIDEST)
    grid.add_column(width=7, no_wrap=True)
    grid.add_column(ratio=1, overflow="fold")
    for width in (14, 14, 22):
        grid.add_column(width=width, justify="right", overflow="fold")
    return grid


def _print_conclusion(console: Console, found: Comparison) -> None:
    if found.metrics:
        text = f"{len(found.metrics)} metrics compared."
        if found.detectable:
            low, typical, high = (100 * limit for limit in found.detectable)
            text += (
                f" With these runs, a change of {typical:.0f} % would have been detected in a "
                f"typical metric ({low:.0f} to {high:.0f} % in most)."
            )
        console.print(text)
    for obstacle in found.obstacles:
        console.print(Text(f"not comparable: {one_line(obstacle)}", "bold"))
        is_noise = obstacle.startswith(NOISE_UNKNOWN)
        console.print(f"  hint: {'paprscm bench ab' if is_noise else '--anyway compares them'}")
    if found.obstacles:
        return
    changes: dict[str, list[Change | None]] = {
        "verdicts": [verdict.change for verdict in found.verdicts],
        "known issues": [issue.change for issue in found.issues],
        "metrics": [result.change for result in found.metrics],
    }
    for change in ("worse", "better", "changed"):
        counts = {name: own.count(change) for name, own in changes.items()}
        if any(counts.values()):
            text = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
            console.print(Text(f"{change}: {text}", _CHANGES[change]))
    if not found.changes or set(found.changes) == {"varies"}:
        console.print(Text("nothing has changed", "bold"))


def _table(console: Console, title: str, *columns: str) -> Table:
    console.print()
    console.print(Text(title, "bold"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column(columns[0], overflow="fold", ratio=1)
    for name in columns[1:]:
        table.add_column(name, justify="right")
    return table


def _change(change: str, words: Mapping[str, str] | None = None) -> Text:
    return Text((words or {}).get(change, change), _CHANGES.get(change, ""))


def _counts(statuses: Mapping[Status, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))


def _number(value: float, unit: str) -> str:
    number = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{number} {unit}" if unit != "1" else number


def _interval(result: MetricResult) -> str:
    def text(value: float) -> str:
        return f"{100 * value:+.1f}" if result.is_relative else f"{value:+.3g}"

    unit = " %" if result.is_relative else ""
    if result.low is None or result.high is None:
        return text(result.shift) + unit
    return f"{text(result.shift)}{unit} [{text(result.low)}, {text(result.high)}]"


def _runs(ids: Sequence[str]) -> str:
    starts = sorted(id_.partition("@")[2][:16] for id_ in ids)
    if len(ids) == 1:
        return f"1 run, {one_line(starts[0])}"
    return f"{len(ids)} runs, {one_line(starts[0])} to {one_line(starts[-1])}"
