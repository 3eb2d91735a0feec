# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm history`: import runs into the database, and list them."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from paprscm.commands import manual
from paprscm.errors import CapabilityError, ConfigError
from paprscm.history.runs import Filter
from paprscm.results.record import FILE, read_record
from paprscm.settings import Settings

# Optional dependencies, and slow to import.
if TYPE_CHECKING:
    from paprscm.history.store import History


def add_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb `history` with its own verbs to those of `paprscm`."""
    text = "Manage the database of runs."
    own = verbs.add_parser("history", help=text, description=text).add_subparsers(
        title="verbs", required=True, metavar="VERB"
    )
    text = "Add runs; status 1 if one of them cannot be read. A run that is present stays."
    added = own.add_parser("import", help=text, description=text, parents=[common])
    text = "a job's folder, or a folder of such folders"
    manual.takes_files(added.add_argument("folders", nargs="+", type=Path, help=text))
    added.set_defaults(verb=import_folders)
    text = "List the runs, the latest last."
    shown = own.add_parser("list", help=text, description=text, parents=[common])
    add_filter(shown)
    shown.set_defaults(verb=list_runs)
    text = "List the tests whose verdict changes between runs in equal conditions."
    flaky = own.add_parser("flaky", help=text, description=text, parents=[common])
    add_filter(flaky)
    flaky.set_defaults(verb=list_flaky)


def add_filter(parser: argparse.ArgumentParser) -> None:
    """Add the options that select runs; filter_of() reads them."""
    group = parser.add_argument_group("selection of runs")
    group.add_argument("--since", type=_time, metavar="DATE", help="started then or later (UTC)")
    group.add_argument("--until", type=_time, metavar="DATE", help="started before")
    group.add_argument("--release", default="", help="beginning of the kernel's release")
    group.add_argument("--qemu-version", default="", help="beginning of QEMU's version")
    group.add_argument("--host", default="", metavar="TEXT", help="a part of the host's CPU")
    group.add_argument("--last", type=_count, metavar="N", help="only the latest N")


def filter_of(arguments: argparse.Namespace) -> Filter:
    """The selection of runs that was given."""
    return Filter(
        since_s=arguments.since,
        until_s=arguments.until,
        kernel=arguments.release,
        qemu=arguments.qemu_version,
        host=arguments.host,
        last=arguments.last,
    )


def open_history(chosen: Settings, *, create: bool = False) -> History:
    """The history of the setting `database`.

    Args:
        chosen: settings.
        create: make it if it is absent.

    Raises:
        Error: it cannot be used, or a library is missing.
    """
    try:
        from paprscm.history.store import History

        return History(chosen.database, create=create)
    except ModuleNotFoundError as error:
        raise CapabilityError(
            f"{error.name}, which the history needs, is not installed",
            hint="tools/setup installs it; in another environment: pip install 'paprscm[history]'",
        ) from error


def import_folders(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Add the runs of folders; one that cannot be read does not stop the others."""
    counts = {"added": 0, "replaced": 0, "present": 0, "refused": 0}
    with open_history(chosen, create=True) as history:
        for folder in (job for given in arguments.folders for job in jobs_in(given)):
            try:
                record = read_record(folder)
                source = os.fsencode(folder.resolve()).decode(errors="replace")
                counts[history.add(record, source)] += 1
            except ConfigError as error:
                counts["refused"] += 1
                print(f"paprscm: {error.message}", file=sys.stderr)
                if error.hint:
                    print(f"  hint: {error.hint}", file=sys.stderr)
        text = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        print(f"{history.name}: {text}")
    return 1 if counts["refused"] else 0


def list_runs(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Print a table of the runs."""
    from paprscm.history.terminal import runs_table

    with open_history(chosen) as history:
        runs = history.runs(filter_of(arguments))
        if not runs:
            print(f"{history.name}: no such run")
            return 0
    console = Console(highlight=False)
    console.print(runs_table(runs, wide=console.width >= 120))
    return 0


def list_flaky(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Print a table of the flaky tests."""
    from paprscm.history.terminal import flaky_table
    from paprscm.history.verdicts import flaky_tests

    with open_history(chosen) as history:
        tests = flaky_tests(history.verdicts(filter_of(arguments)))
    if not tests:
        print("no verdict has changed between runs in equal conditions")
        return 0
    Console(highlight=False).print(flaky_table(tests))
    return 0


def jobs_in(folder: Path) -> list[Path]:
    """The folder itself, or the jobs' folders in it, without the link `latest`."""
    if (folder / FILE).exists():
        return [folder]
    jobs = sorted(file.parent for file in folder.glob(f"*/{FILE}"))
    return [job for job in jobs if not job.is_symlink()] or [folder]


def _time(text: str) -> float:
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not YYYY-MM-DD or an ISO time") from error
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)
