# SPDX-License-Identifier: GPL-2.0-or-later
"""The verbs for a job's results: print or convert them, and run its failed tests again."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from paprscm import log, settings
from paprscm.errors import ConfigError
from paprscm.formats import delivery, kcidb
from paprscm.formats.context import read_context
from paprscm.formats.registry import FILES, FORMATS, parse_names
from paprscm.formats.spool import Spool
from paprscm.paths import SUITE_VARIABLE
from paprscm.results.files import publish
from paprscm.results.record import BROKEN, Record, Test, read_record
from paprscm.results.terminal import print_summary
from paprscm.settings import Settings

LATEST = Path("results/latest")


def show(job: Path, chosen: Settings, *, formats: str, output: Path | None, build: str) -> int:
    """Print a job's results, or convert them.

    Args:
        job: the job's folder.
        chosen: settings, for reports.
        formats: names separated by commas; "": print them for a person.
        output: a file for one format, or a folder for several; None: the standard output.
        build: id of a build that another origin has reported to KCIDB.

    Raises:
        ConfigError: the job or a format cannot be used.
    """
    names = parse_names(formats)
    record = read_record(job)
    folder = job if job.is_dir() else job.parent
    context = read_context(record, folder, chosen, build)
    if not names:
        if output is not None:
            raise ConfigError("--output without --format")
        print_summary(Console(highlight=False), record, folder, context.excerpts)
        return 0
    into_folder = output is not None and output.is_dir()
    if len(names) > 1 and not into_folder:
        raise ConfigError("several formats, but --output is not a folder", hint="--output FOLDER")
    if "kcidb" in names and (count := kcidb.left_out(record)):
        log.logger.info("left out of the report to KCIDB, tests without a kernel: %d", count)
    for name in names:
        text = FORMATS[name](record, context)
        if output is None:
            sys.stdout.write(text)
        else:
            publish(text.encode(), output / FILES[name] if output.is_dir() else output)
    return 0


def submit(
    job: Path, chosen: Settings, receiver: str, *, project: str, build: str, wait_s: float
) -> int:
    """Deliver a job's results, and what earlier attempts have left in the spool.

    Args:
        job: the job's folder.
        chosen: settings, for reports and the spool.
        receiver: one of delivery.RECEIVERS.
        project: "GROUP/PROJECT" of SQUAD.
        build: id of a build that another origin has reported to KCIDB.
        wait_s: time to wait until KCIDB has processed the report.

    Returns:
        1 if KCIDB could not process a report, else 0.

    Raises:
        Error: a report was not accepted.
    """
    server = delivery.server_of(receiver, os.environ)
    record = read_record(job)
    context = read_context(record, job if job.is_dir() else job.parent, chosen, build)
    spool = Spool(chosen.cache_dir / "spool")
    for report in delivery.reports(receiver, server.url, record, context, project):
        if (earlier := spool.add(report)) is not None:
            print(f"{report.name}: sent before, accepted as {earlier}")
    states = set()
    for outcome in delivery.deliver(spool, receiver, server):
        print(f"{outcome.name}: accepted by {server.url} as {outcome.id}")
        if receiver == "kcidb":
            # 200 means that the report was stored, not that it is valid.
            state = delivery.follow(server, outcome.id, wait_s)
            print(f"{outcome.name}: {state}")
            states.add(state)
    return 1 if states & {"failed", "notfound"} else 0


def rerun(job: Path, *, failed: bool, rest: list[str]) -> int:
    """Run the tests of a job again, with its settings; replaces this process.

    Args:
        job: the job's folder.
        failed: only those that ended as FAIL or ERROR, or were interrupted.
        rest: more words for Avocado.
    """
    record = read_record(job)
    tests = [test for test in record.tests if test.status in BROKEN or not failed]
    if not tests:
        print(f"no test of {job} has failed")
        return 0
    if Path(record.job.folder).is_dir():
        os.chdir(record.job.folder)
    words = [str(Path(sys.executable).with_name("avocado")), "run", *rest]
    words += [word for pair in parameters(record).items() for word in ("-p", "=".join(pair))]
    words += dict.fromkeys(map(reference, tests))
    os.environ[SUITE_VARIABLE] = "1"
    return os.execv(words[0], words)  # noqa: S606


def parameters(record: Record, *, config: Path = Path("avocado.cfg")) -> Mapping[str, str]:
    """Values of -p with which tests have the job's settings, whatever avocado.cfg has now."""
    values = dict(record.job.parameters)
    environments = [e for e in map(record.environment, record.tests) if e is not None]
    if not environments:
        return values
    then = max(environments, key=environments.count).settings
    known = {name: value for name, value in values.items() if name in settings.names()}
    now = settings.changed(settings.load(known, config=config))
    usual = settings.as_texts(Settings())
    different = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return {**values, **{name: then.get(name, usual[name]) for name in different}}


def reference(test: Test) -> str:
    """Avocado's reference to one test: a file, and a regular expression for class and method."""
    method = test.name.partition(":")[2].partition(";")[0]
    return f"{test.file}:{method}$" if method else test.file
