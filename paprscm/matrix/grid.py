# SPDX-License-Identifier: GPL-2.0-or-later
"""One grid of the cells of many hosts: tests by cells, for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rich.table import Table
from rich.text import Text

from paprscm.matrix.outcome import Finished
from paprscm.matrix.plan import Exclusion
from paprscm.results.record import Status
from paprscm.results.tally import ORDER, statuses
from paprscm.results.text import one_line

MARKS: dict[Status, tuple[str, str]] = {
    "PASS": ("·", "green"),
    "WARN": ("w", "yellow"),
    "CANCEL": ("-", "dim"),
    "SKIP": ("-", "dim"),
    "FAIL": ("F", "bold red"),
    "ERROR": ("E", "bold magenta"),
    "INTERRUPTED": ("I", "bold magenta"),
}
"""Letter and colour of a status."""
_NOTHING = " "
_TEMPLATE = Path(__file__).with_name("grid.html.j2")


@dataclass(frozen=True)
class Row:
    """A test in all cells.

    Attributes:
        name: the test.
        statuses: its status by cell; a cell without it is missing.
        reasons: its reason by cell, where it did not PASS.
    """

    name: str
    statuses: dict[str, Status]
    reasons: dict[str, str]

    @property
    def is_plain(self) -> bool:
        """Whether no cell differs from the others, and none is bad."""
        return len(set(self.statuses.values())) <= 1 and not self.is_bad

    @property
    def is_bad(self) -> bool:
        """Whether it ended as FAIL or ERROR, or was interrupted."""
        return bool({"FAIL", "ERROR", "INTERRUPTED"} & set(self.statuses.values()))


def rows(cells: Sequence[Finished]) -> list[Row]:
    """The tests of all cells, by name."""
    found: dict[str, Row] = {}
    for cell in cells:
        for test in cell.record.tests if cell.record else ():
            row = found.setdefault(test.name, Row(test.name, {}, {}))
            row.statuses[cell.outcome.cell] = test.status
            if test.status != "PASS":
                issues = ", ".join(finding.name for finding in test.shown)
                row.reasons[cell.outcome.cell] = one_line(test.reason or issues)
    return [found[name] for name in sorted(found)]


def summary(cell: Finished) -> str:
    """Counts of a cell by status, the worst first; or why it was not built."""
    if cell.record is None:
        return f"not built: {one_line(cell.outcome.reason)}"
    counts = statuses(cell.record)
    return ", ".join(f"{counts[status]} {status}" for status in ORDER if counts[status])


def tables(cells: Sequence[Finished], *, every: bool = False) -> list[Table]:
    """The cells with their numbers, and the tests by these numbers.

    Args:
        cells: cells that have ended.
        every: also the tests with the same status in all cells.
    """
    legend = Table(box=None, padding=(0, 1))
    for name in ("", "cell", "tests", "time"):
        legend.add_column(name, justify="right" if name in ("", "time") else "left")
    for number, cell in enumerate(cells, start=1):
        minutes = f"{cell.outcome.duration_s / 60:.1f} min"
        text = Text(summary(cell), style="" if cell.is_fine else "red")
        legend.add_row(str(number), cell.outcome.cell, text, minutes)
    grid = Table(box=None, padding=(0, 1, 0, 0))
    grid.add_column("test", overflow="ellipsis", no_wrap=True)
    for number in range(1, len(cells) + 1):
        grid.add_column(str(number), width=2, justify="right")
    shown = [row for row in rows(cells) if every or not row.is_plain]
    for row in shown:
        marks = [
            Text(*MARKS[status]) if status in MARKS else Text(_NOTHING)
            for status in (row.statuses.get(cell.outcome.cell) for cell in cells)
        ]
        grid.add_row(row.name, *marks)
    return [legend, grid] if shown else [legend]


def page(cells: Sequence[Finished], exclusions: Sequence[Exclusion] = ()) -> str:
    """The grid as an HTML page without any other file.

    Args:
        cells: cells that have ended.
        exclusions: combinations that were left out, with reasons.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        cells=[(cell, summary(cell)) for cell in cells],
        rows=rows(cells),
        marks=MARKS,
        exclusions=[
            (
                "; ".join(f"{a}: {', '.join(some)}" for a, some in one.values.items()),
                one_line(one.reason),
            )
            for one in exclusions
        ],
    )


def durations(cells: Sequence[Finished]) -> dict[str, float]:
    """Duration of each cell, s, for `shard`."""
    return {cell.outcome.cell: round(cell.outcome.duration_s, 1) for cell in cells}
