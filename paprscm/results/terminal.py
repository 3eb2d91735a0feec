# SPDX-License-Identifier: GPL-2.0-or-later
"""The results of a job for a person at a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from paprscm.results import tally
from paprscm.results.record import BROKEN, Record, Status, Test
from paprscm.results.text import explanation, first_line, one_line, plain

STYLES: Final[Mapping[str, str]] = {
    "PASS": "green",
    "WARN": "yellow",
    "FAIL": "bold red",
    "ERROR": "bold magenta",
    "INTERRUPTED": "red",
    "CANCEL": "cyan",
    "SKIP": "dim",
}
_FULL: Final = 10
"""Tests that broke and are shown in full; each of the others takes a line."""
_REASON_LINES: Final = 12
_CONSOLE_LINES: Final = 6
_LABEL = 10


def print_progress(
    console: Console,
    status: str,
    name: str,
    *,
    count: tuple[int, int],
    duration_s: float | None,
    reason: str,
) -> None:
    """Print the line of a test that has ended.

    Args:
        console: the terminal.
        status: its verdict.
        name: its name.
        count: number of tests that have ended, and of all tests.
        duration_s: its duration; None: it was not run.
        reason: its reason. That of a WARN is left for the end of the job, where each known issue
            has one line.
    """
    ended, total = count
    line = Text(f"({ended:>{len(str(total))}}/{total}) ")
    line.append(f"{status:<6}", STYLES.get(status, ""))
    line.append(f" {plain(name)}")
    if duration_s is not None:
        line.append(f"  {tally.seconds(duration_s)}", "dim")
    console.print(line, soft_wrap=True)
    if status not in ("PASS", "WARN") and reason:
        text = Text(first_line(reason), no_wrap=True, overflow="ellipsis")
        console.print(Padding(text, (0, 0, 0, len(str(total)) * 2 + 4)))


def print_summary(
    console: Console, record: Record, folder: Path, excerpts: Mapping[str, str]
) -> None:
    """Print the tests that broke, the known issues, and the counts by subject.

    Args:
        console: the terminal.
        record: of the job.
        folder: the job's folder, as the user sees it.
        excerpts: the console's last lines by test.
    """
    broken = [test for test in record.tests if test.status in BROKEN]
    # A job that was interrupted has many tests that were not started; they have no more to say.
    full = [test for test in broken if test.times is not None][:_FULL]
    for test in full:
        console.print()
        _print_broken(console, test, folder, excerpts.get(test.id, ""))
    if rest := [test for test in broken if test not in full]:
        console.print()
        for test in rest[:_FULL]:
            line = _status(test.status)
            line.append(f" {plain(test.name)}: {first_line(test.reason)}")
            console.print(line, no_wrap=True, overflow="ellipsis")
        if len(rest) > _FULL:
            console.print(f"and {len(rest) - _FULL} more tests")
    _print_issues(console, record)
    if remarks := [test for test in record.tests if test.status == "WARN" and not test.shown]:
        console.print()
        console.print(Text("Remarks", "bold"))
        for test in remarks:
            console.print(Padding(f"{plain(test.name)}: {one_line(test.reason)}", (0, 0, 0, 2)))
    console.print()
    console.print(_table(record))
    if broken:
        command = f"paprscm rerun --failed {folder}"
        console.print(Text(f"Run the {_tests(len(broken))} again: {command}"), soft_wrap=True)


def _print_broken(console: Console, test: Test, folder: Path, excerpt: str) -> None:
    head = _status(test.status)
    head.append(f" {plain(test.name)}", "bold")
    console.print(head, soft_wrap=True)
    _print_part(console, "contract", test.contract)
    lines = explanation(test).strip().splitlines()
    more = [f"… {len(lines) - _REASON_LINES} more lines in the log"]
    kept = lines if len(lines) <= _REASON_LINES + 1 else lines[:_REASON_LINES] + more
    _print_part(console, "reason", "\n".join(kept))
    _print_part(console, "its end", "\n".join(excerpt.splitlines()[-_CONSOLE_LINES:]), "dim")
    for log in (test.logs[0] if test.logs else None, test.console):
        if log is not None:
            name = Path(log).name
            _print_whole(console, "log" if name == "debug.log" else "console", str(folder / log))
    _print_whole(console, "run again", test.command)


def _print_whole(console: Console, label: str, text: str) -> None:
    """Print a path or a command, which must stay in one piece: the terminal wraps it."""
    line = Text(f"  {label:<{_LABEL}} ", "dim")
    line.append(plain(text), "default not dim")
    console.print(line, soft_wrap=True)


def _print_part(console: Console, label: str, text: str, style: str = "") -> None:
    if not text:
        return
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=_LABEL)
    grid.add_column(ratio=1, overflow="fold")
    grid.add_row(Text(label, "dim"), Text(plain(text), style))
    console.print(Padding(grid, (0, 0, 0, 2)))


def _print_issues(console: Console, record: Record) -> None:
    issues = tally.issues(record)
    if not issues:
        return
    console.print()
    console.print(Text("Known issues", "bold"))
    width = max(map(len, issues))
    for name, issue in issues.items():
        line = Text(f"{issue.tests:>4}x ")
        line.append(f"{name:<{width}} ", STYLES["WARN"])
        line.append(issue.title)
        console.print(line, no_wrap=True, overflow="ellipsis")


def _table(record: Record) -> Table:
    counts = tally.statuses(record)
    columns = [status for status in tally.ORDER if counts[status]]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True)
    table.add_column("subject", "all")
    for status in columns:
        style = STYLES[status]
        table.add_column(
            Text(status, style), str(counts[status]), justify="right", no_wrap=True, style=style
        )
    subjects = tally.subjects(record)
    total_s = sum(subject.duration_s for subject in subjects.values())
    table.add_column("time", tally.seconds(total_s), justify="right", no_wrap=True)
    for name, subject in subjects.items():
        cells = [str(subject.statuses[status] or "") for status in columns]
        table.add_row(name, *cells, tally.seconds(subject.duration_s))
    return table


def _status(status: Status) -> Text:
    return Text(f"{status:<5}", STYLES.get(status, ""))


def _tests(count: int) -> str:
    return "test that failed" if count == 1 else f"{count} tests that failed"
