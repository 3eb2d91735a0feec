# SPDX-License-Identifier: GPL-2.0-or-later
"""The history for a person at a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import count

from rich import box
from rich.table import Table
from rich.text import Text

from paprscm.history.flaky import Flaky
from paprscm.history.runs import Run
from paprscm.results.tally import ORDER
from paprscm.results.terminal import STYLES
from paprscm.results.text import one_line

_ID = 8
"""Characters of an id that are shown if they are enough."""


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
