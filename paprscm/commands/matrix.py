# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm matrix`: list, run and merge the cells of a matrix."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from paprscm import settings
from paprscm.commands import manual
from paprscm.errors import ConfigError, HostError
from paprscm.host import process
from paprscm.host.cache import Cache
from paprscm.matrix import choice, grid
from paprscm.matrix.outcome import (
    CELLS,
    DONE,
    Finished,
    Outcome,
    mark_done,
    read_finished,
    read_outcome,
)
from paprscm.matrix.plan import Cell, Plan, read_plan
from paprscm.results.files import publish
from paprscm.results.record import FILE, read_record
from paprscm.settings import Settings

_STRENGTHS = {"2": 2, "3": 3, "all": None}
_ERROR = "paprscm: "


def add_verbs(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
    """Add the verbs list, run and merge."""
    text = "Run the tests on many kernels, QEMUs and machines."
    matrix = verbs.add_parser("matrix", help=text, description=text)
    inner = matrix.add_subparsers(title="verbs", required=True, metavar="VERB")

    def add(name: str, verb: Callable[..., int], text: str) -> argparse.ArgumentParser:
        added = inner.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(verb=verb)
        return added

    listed = add("list", _list, "Print the cells of a matrix; nothing is run.")
    listed.add_argument("--json", action="store_true", help="as JSON, for schedulers")
    run = add("run", _run, "Run cells of a matrix, one after the other.")
    text = "only this cell; may be repeated"
    run.add_argument("--cell", action="append", default=[], metavar="ID", help=text)
    text = "folder for the results of all cells (results/matrix)"
    output = Path("results/matrix")
    manual.takes_files(run.add_argument("--output", type=Path, default=output, help=text))
    text = "leave out cells that were built and have ended"
    run.add_argument("--resume", action="store_true", help=text)
    for one in (listed, run):
        manual.takes_files(one.add_argument("file", type=Path, help="the matrix, a TOML file"))
        text = "2: each pair of values is in a cell (default); 3: each triple; all: every cell"
        one.add_argument("--strength", choices=_STRENGTHS, default="2", help=text)
        text = "only the cells of one of N hosts, such as 1/3; all hosts need the same --durations"
        one.add_argument("--shard", metavar="I/N", help=text)
        text = "durations.json of an earlier `paprscm matrix merge`, to share the time fairly"
        manual.takes_files(one.add_argument("--durations", type=Path, help=text))
    merged = add("merge", _merge, "Print one grid of the cells in several output folders.")
    manual.takes_files(merged.add_argument("outputs", nargs="+", type=Path, metavar="DIR"))
    merged.add_argument("--all", action="store_true", help="also tests that are alike in all cells")
    text = "write the grid as grid.html, and durations.json, into this folder"
    manual.takes_files(merged.add_argument("--output", type=Path, help=text))
    text = "the matrix, for the combinations that it leaves out"
    manual.takes_files(merged.add_argument("--file", type=Path, help=text))


def _list(arguments: argparse.Namespace, chosen: Settings) -> int:
    del chosen
    plan = read_plan(arguments.file)
    cells = _chosen(plan, arguments)
    if arguments.json:
        print(json.dumps(_document(cells), indent=2))
        return 0
    for cell in cells:
        print(cell.id)
    return 0


def _document(cells: list[Cell]) -> dict[str, Any]:
    """The cells for a scheduler: a job array counts them from 0."""
    return {
        "format": "paprscm-matrix/1",
        "cells": [
            {"index": index, "id": cell.id, "values": cell.values, "settings": cell.settings}
            for index, cell in enumerate(cells)
        ],
    }


def _chosen(plan: Plan, arguments: argparse.Namespace) -> list[Cell]:
    cells = choice.choose(plan, _STRENGTHS[arguments.strength])
    if arguments.shard is None:
        return cells
    number, _, count = arguments.shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--shard {arguments.shard} is not I/N", hint="1/3, 2/3 and 3/3")
    return choice.shard(cells, int(number), int(count), _durations(arguments.durations))


def _durations(file: Path | None) -> dict[str, float]:
    if file is None:
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, float])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{file} holds no durations: {error}") from error


def _run(arguments: argparse.Namespace, chosen: Settings) -> int:
    plan = read_plan(arguments.file)
    if arguments.cell:
        every = {cell.id: cell for cell in plan.cells()}
        if unknown := [name for name in arguments.cell if name not in every]:
            raise ConfigError(
                f"{arguments.file} has no cell {unknown[0]}",
                hint=f"paprscm matrix list --strength all {arguments.file}",
            )
        cells = [every[name] for name in arguments.cell]
    else:
        cells = _chosen(plan, arguments)
    given = {
        name: value for name in settings.names() if (value := getattr(arguments, name)) is not None
    }
    cache = Cache(chosen.cache_dir)
    fine = True
    for number, cell in enumerate(cells, start=1):
        folder = arguments.output / CELLS / cell.id
        title = f"({number}/{len(cells)}) {cell.id}"
        before = read_outcome(folder) if arguments.resume else None
        if before is not None and before.job:
            print(f"{title}: has ended before")
            continue
        name = f"matrix-{Cache.key({'folder': str(folder.resolve())})}"
        with cache.lock(name, purpose=f"runs the cell {cell.id}", wait=False) as mine:
            if not mine:
                raise ConfigError(f"{folder} is in use", hint="another run has the same cell")
            try:
                ended = _run_cell(plan, cell, folder, {**given, **cell.settings})
            except HostError as error:
                # Without its mark; the others do not depend on it.
                print(f"{title}: {error}", flush=True)
                fine = False
                continue
        print(f"{title}: {grid.summary(ended)}; {ended.outcome.duration_s:.0f} s", flush=True)
        fine = fine and ended.is_fine
    return 0 if fine else 1


def _run_cell(plan: Plan, cell: Cell, folder: Path, given: dict[str, str]) -> Finished:
    """Build what a cell needs, run its tests, and mark it as done."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    log_file = folder / "output.log"
    log_file.write_bytes(b"")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    command = [sys.executable, "-m", "paprscm.commands.cli"]
    job, reason, record = "", "", None
    built = process.run(
        [*command, "image", "--quiet", *options], log_file=log_file, check=False, keep_lines=10
    )
    begin = time.monotonic()
    if built.status:
        said = [line for line in built.lines if line.startswith(_ERROR)]
        reason = said[-1].removeprefix(_ERROR) if said else f"status {built.status}"
    else:
        before = set(folder.glob(f"job-*/{FILE}"))
        words = [*options, *(word for tag in plan.tags for word in ("-t", tag)), *plan.tests]
        rest = ["--", "--job-results-dir", str(folder.absolute())]
        ran = process.run([*command, "run", *words, *rest], log_file=log_file, check=False)
        new = sorted(set(folder.glob(f"job-*/{FILE}")) - before)
        if not new:
            raise HostError(
                f"its job left no results (status {ran.status}): " + " ".join(ran.lines[-3:]),
                hint=f"see {log_file}",
            )
        record = read_record(new[-1])
        # Avocado's exit status tells an interrupted job like one whose test took too long.
        if record.job.interruption is not None:
            raise KeyboardInterrupt
        if record.job.end is None:
            raise HostError(
                "its job was killed", hint="`paprscm matrix run --resume` runs it again"
            )
        job = new[-1].parent.name
    outcome = Outcome(
        cell=cell.id,
        values=dict(cell.values),
        settings=given,
        job=job,
        reason=reason,
        duration_s=time.monotonic() - begin,
    )
    mark_done(folder, outcome)
    return Finished(folder, outcome, record)


def _merge(arguments: argparse.Namespace, chosen: Settings) -> int:
    del chosen
    cells = read_finished(arguments.outputs)
    exclusions = read_plan(arguments.file).exclusions if arguments.file else ()
    console = Console()
    for table in grid.tables(cells, every=arguments.all):
        console.print(table)
        console.print()
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        publish(grid.page(cells, exclusions).encode(), arguments.output / "grid.html")
        text = json.dumps(grid.durations(cells), indent=2)
        publish(text.encode(), arguments.output / "durations.json")
    return 0 if all(cell.is_fine for cell in cells) else 1
