# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes a site."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from paprscm.errors import ConfigError
from paprscm.report.folder import check, replacement
from paprscm.report.histories import histories, issues
from paprscm.report.pages import Console, Site
from paprscm.report.runs import in_order
from paprscm.results.record import Record, Test

_HERE = Path(__file__).parent
ASSETS: Final = (
    *(_HERE / "assets" / name for name in ("icon.svg", "site.css", "site.js", "grid.js")),
    *(_HERE / "assets" / name for name in ("overview.js", "test.js", "compare.js")),
    *(_HERE / "vendor" / name for name in ("uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE")),
)
"""Files of every site."""


@dataclass(frozen=True)
class Contents:
    """Number of runs and of tests in a site."""

    runs: int
    tests: int


def no_console(_record: Record, _test: Test) -> tuple[str, ...]:
    """A console without lines, for records without their job's folder."""
    return ()


def write_site(
    records: Iterable[Record], output: Path, *, console: Console = no_console
) -> Contents:
    """Write a site about runs; equal records give equal files.

    Args:
        records: in any order.
        output: absent, an empty folder, or an earlier site, which is replaced as a whole.
        console: returns the last lines of a test's console.

    Raises:
        ConfigError: there is no record, or the output is something else.
        HostError: the site cannot be written.
    """
    check(output.resolve())
    runs = in_order(records)
    if not runs:
        raise ConfigError("no run to report", hint="give a job's folder, such as results/latest")
    tests = histories(runs)
    site = Site(runs, tests, issues(runs), console)
    with replacement(output) as folder:
        for name in ("assets", "data", "runs", "tests"):
            (folder / name).mkdir()
        for asset in ASSETS:
            shutil.copyfile(asset, folder / "assets" / asset.name)
        for name, text in site.files():
            (folder / name).write_text(text, encoding="utf-8")
    return Contents(len(runs), len(tests))
