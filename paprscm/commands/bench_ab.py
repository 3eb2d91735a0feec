# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm bench ab`: alternating jobs with two kernels or QEMUs, and their comparison."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from paprscm import log, settings
from paprscm.commands.bench_suite import run_avocado
from paprscm.errors import ConfigError, HostError
from paprscm.paths import SUITE_VARIABLE
from paprscm.results.record import FILE, Record, read_record
from paprscm.settings import Settings

SIDES = ("a", "b")
_LAST_LINES = 15


def add_verb(benches: Any, common: argparse.ArgumentParser, suite: str) -> None:
    """Add `ab` to the verbs of `paprscm bench`.

    Args:
        benches: the subparsers of `bench`.
        common: options of the settings.
        suite: path of the suite's tests.
    """
    text = (
        "Run jobs with two sets of settings, alternating, and compare them as `paprscm compare` "
        "does. Words after -- are for `avocado run`."
    )
    added = benches.add_parser("ab", help=text, description=text, parents=[common])
    for side in SIDES:
        text = f"setting of {side.upper()}, such as kernel=~/vmlinux; may be repeated"
        added.add_argument(
            f"--{side}", action="append", default=[], metavar="NAME=VALUE", help=text
        )
    added.add_argument("--rounds", type=int, default=6, help="jobs of each side (6)")
    text = "files or test names; default: all tests of the suite"
    added.add_argument("--tests", nargs="+", default=[suite], metavar="PATH", help=text)
    text = "folder of the jobs; jobs of an earlier run in it count (results/ab)"
    added.add_argument("--output", type=Path, default=Path("results/ab"), help=text)
    added.set_defaults(verb=ab)


def ab(arguments: argparse.Namespace, chosen: Settings) -> int:
    """Run the jobs that are missing, and compare."""
    from paprscm.history.comparison import compare
    from paprscm.history.terminal import print_comparison

    del chosen  # Loading has checked them; the jobs read the options below.
    if arguments.rounds < 1:
        raise ConfigError("--rounds must be at least 1")
    given = {name: getattr(arguments, name) for name in settings.names()}
    values = {
        side: side_settings(
            {name: value for name, value in given.items() if value is not None},
            getattr(arguments, side),
        )
        for side in SIDES
    }
    if values["a"] == values["b"]:
        raise ConfigError("A and B have the same settings", hint="--b qemu=debian:trixie")
    folders = {side: arguments.output / side for side in SIDES}
    os.environ[SUITE_VARIABLE] = "1"
    for number, side in schedule(arguments.rounds):
        if len(complete_jobs(folders[side])) > number:
            continue
        folders[side].mkdir(parents=True, exist_ok=True)
        with log.step(f"round {number + 1} of {arguments.rounds}: {side.upper()}"):
            argv = job_argv(values[side], arguments.tests, folders[side], arguments.rest)
            run_job(argv, folders[side], number)
    found = compare(*(complete_jobs(folders[side])[: arguments.rounds] for side in SIDES))
    print_comparison(Console(highlight=False), found, every_metric=False)
    return found.status


def side_settings(given: Mapping[str, str], words: Sequence[str]) -> dict[str, str]:
    """The settings of one side.

    Args:
        given: options of both sides.
        words: NAME=VALUE of this side.

    Raises:
        ConfigError: a setting is unknown, or its value does not fit.
    """
    values = dict(given)
    for word in words:
        name, mark, value = word.partition("=")
        if not mark:
            raise ConfigError(f"{word} is not NAME=VALUE", hint="such as qemu=debian:trixie")
        values[name] = value
    settings.load(values)
    return values


def schedule(rounds: int) -> Iterator[tuple[int, str]]:
    """Rounds and sides in the order A B B A …, in which a drift of the host affects both."""
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            yield number, side


def job_argv(
    values: Mapping[str, str], tests: Sequence[str], folder: Path, rest: Sequence[str]
) -> list[str]:
    """The command line of one job; its tests run one by one, as they would disturb each other."""
    return [
        *(str(Path(sys.executable).with_name("avocado")), "run", "--max-parallel-tasks=1"),
        *("--job-results-dir", str(folder), *rest, *tests),
        *(word for name, value in values.items() for word in ("-p", f"{name}={value}")),
    ]


def complete_jobs(folder: Path) -> list[Record]:
    """The records of the jobs that have ended, the oldest first."""
    records = []
    for file in folder.glob(f"*/{FILE}"):
        if file.parent.is_symlink():
            continue
        try:
            record = read_record(file)
        except ConfigError as error:
            log.logger.warning("left out: %s", error.message)
            continue
        if record.job.end is not None and record.job.interruption is None:
            records.append(record)
    return sorted(records, key=lambda record: (record.job.start, record.job.id))


def run_job(argv: Sequence[str], folder: Path, number: int) -> None:
    """Run a job to its end.

    Args:
        argv: its command line.
        folder: folder of the jobs.
        number: number of complete jobs that are there.

    Raises:
        HostError: it left no record, or was interrupted.
    """
    output = folder / f"avocado-{number}.log"
    run_avocado(argv, output)
    if len(complete_jobs(folder)) <= number:
        text = output.read_text(errors="replace")
        raise HostError(
            f"the job did not end with results:\n{log.quoted(text, last=_LAST_LINES)}",
            hint=f"the jobs so far stay in {folder}, and count",
        )
