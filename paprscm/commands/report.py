# SPDX-License-Identifier: GPL-2.0-or-later
"""The verb that writes a static site about many jobs, and serves it on this machine."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from paprscm import log
from paprscm.commands import history, manual
from paprscm.errors import ConfigError
from paprscm.history.runs import ALL
from paprscm.report.serve import serve
from paprscm.report.site import write_site
from paprscm.results.record import Record, Test, read_record
from paprscm.results.text import last_lines
from paprscm.settings import Settings

RESULTS = Path("results")
_CONSOLE_LINES = 60


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    text = "jobs' folders, or folders that contain them (results)"
    manual.takes_files(parser.add_argument("jobs", nargs="*", type=Path, metavar="DIR", help=text))
    text = "the runs in the database of `paprscm history`, in addition to DIR"
    parser.add_argument("--history", action="store_true", help=text)
    history.add_filter(parser)
    text = "folder of the site: a new one, or an earlier site, which is replaced"
    manual.takes_files(parser.add_argument("--output", type=Path, metavar="SITE", help=text))
    text = "serve the site at 127.0.0.1 until Ctrl-C (0: any free port)"
    parser.add_argument("--serve", nargs="?", type=int, const=0, metavar="PORT", help=text)


def write(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Write the site of `paprscm report`, and serve it if that is wanted.

    Raises:
        ConfigError: a folder or an option cannot be used.
        HostError: the site cannot be written.
    """
    if arguments.output is None and arguments.serve is None:
        raise ConfigError("neither --output nor --serve", hint="--output SITE writes the site")
    if not arguments.history and history.filter_of(arguments) != ALL:
        raise ConfigError("a selection of runs without --history", hint="it selects stored runs")
    jobs = arguments.jobs or ([] if arguments.history else [RESULTS])
    with contextlib.ExitStack() as stack:
        output = arguments.output or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="paprscm-report-"))
        )
        folders: dict[tuple[str, str], Path] = {}

        def console(record: Record, test: Test) -> list[str]:
            folder = folders.get((record.job.id, record.job.start))
            if folder is None or test.console is None:
                return []
            return last_lines(folder / test.console, _CONSOLE_LINES)

        records: Iterable[Record] = _records(jobs, folders)
        if arguments.history:
            stored = stack.enter_context(history.open_history(chosen))
            records = itertools.chain(stored.records(history.filter_of(arguments)), records)
        contents = write_site(records, output, console=console)
        counts = (_count(contents.runs, "run"), _count(contents.tests, "test"))
        print(f"{output / 'index.html'}: {', '.join(counts)}")
        if arguments.serve is not None:
            serve(output, arguments.serve, lambda url: print(f"{url} (Ctrl-C ends)", flush=True))
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _records(jobs: Iterable[Path], folders: dict[tuple[str, str], Path]) -> Iterator[Record]:
    """The records of jobs' folders; `folders` gets the folder of each job by its id and start."""
    for job in jobs:
        found = history.jobs_in(job)
        for folder in found:
            try:
                record = read_record(folder)
            except ConfigError as error:
                # A folder that was named has to be usable; one of many need not.
                if found == [job]:
                    raise
                log.logger.warning("left out: %s", error.message)
                continue
            # A job's folder, or the document itself.
            home = folder if folder.is_dir() else folder.parent
            folders[record.job.id, record.job.start] = home
            yield record
