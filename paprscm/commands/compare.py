# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm compare`: two sets of runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from paprscm.commands import history, manual
from paprscm.errors import ConfigError
from paprscm.results.record import Record, read_record
from paprscm.settings import Settings


def add_verb(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb `compare` to those of `paprscm`."""
    text = (
        "Compare two sets of runs: paprscm compare A… -- B…; status 0: nothing is worse, 1: "
        "something is, 2: not comparable."
    )
    added = verbs.add_parser("compare", help=text, description=text, parents=[common])
    text = "jobs' folders, folders of such folders, or ids of runs in the history"
    manual.takes_files(added.add_argument("runs", nargs="+", metavar="RUN", help=text))
    text = "metric of each run that measures its host's speed; default: one named 'reference'"
    added.add_argument("--reference", metavar="NAME", default="reference", help=text)
    text = "change that matters, instead of that of each metric: 3 for times and rates"
    added.add_argument("--minimum", type=float, metavar="PERCENT", help=text)
    text = "also if host or settings differ, or a set mixes conditions"
    added.add_argument("--anyway", action="store_true", help=text)
    text = "print every metric, not only those that have changed"
    added.add_argument("--all", action="store_true", help=text)
    added.add_argument("--json", action="store_true", help="print the comparison as JSON")
    added.set_defaults(verb=compare_sets)


def compare_sets(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Compare two sets of runs and print the differences."""
    from paprscm.history.comparison import compare
    from paprscm.history.terminal import print_comparison

    if not arguments.rest:
        raise ConfigError("one set of runs is missing", hint="paprscm compare A… -- B…")
    if arguments.minimum is not None and not 0 <= arguments.minimum < 1000:
        raise ConfigError("--minimum is a percentage: 0 or more")
    found = compare(
        _records(arguments.runs, chosen),
        _records(arguments.rest, chosen),
        reference=arguments.reference,
        minimum=None if arguments.minimum is None else arguments.minimum / 100,
        anyway=arguments.anyway,
    )
    if arguments.json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    else:
        print_comparison(Console(highlight=False), found, every_metric=arguments.all)
    return found.status


def _records(words: Sequence[str], chosen: Settings) -> list[Record]:
    """The runs of folders, and of the history for words that are not a path."""
    records: list[Record] = []
    with ExitStack() as stack:
        opened = None
        for word in words:
            if Path(word).exists() or "/" in word:
                records += map(read_record, history.jobs_in(Path(word)))
                continue
            opened = opened or stack.enter_context(history.open_history(chosen))
            records.append(opened.find(word))
    return records
