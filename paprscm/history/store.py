# SPDX-License-Identifier: GPL-2.0-or-later
"""Records of runs in the database."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Self

import sqlalchemy as sa
import zstandard
from sqlalchemy.engine import Row

from paprscm.errors import ConfigError
from paprscm.history.database import Database
from paprscm.history.tables import RUNS
from paprscm.results import tally
from paprscm.results.record import Environment, Record, decode, encode

Outcome = Literal["added", "replaced", "present"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run in the list of runs.

    Attributes:
        id: see run_id().
        started_s: seconds since the epoch.
        source: the folder that was imported.
        is_complete: the job has ended, it was not killed.
        kernel: release of the guests' kernel; "" without one.
        qemu: version.
        host: CPU and cores.
        suite: version and commit.
        statuses: number of tests by status.
    """

    id: str
    started_s: float
    source: str
    is_complete: bool
    kernel: str
    qemu: str
    host: str
    suite: str
    statuses: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Selects runs; each condition that is given must hold.

    Attributes:
        since_s: started then or later, seconds since the epoch.
        until_s: started before.
        kernel: beginning of the kernel's release.
        qemu: beginning of QEMU's version.
        host: a part of the host's description.
        last: only so many, the latest ones.
    """

    since_s: float | None = None
    until_s: float | None = None
    kernel: str = ""
    qemu: str = ""
    host: str = ""
    last: int | None = None


ALL = Filter()


def run_id(record: Record) -> str:
    """Identity of a run: its job's id and start. Importing it twice is importing it once.

    Avocado's ids are random, but `--force-job-id` gives two jobs the same.
    """
    return f"{record.job.id}@{record.job.start}"


class History:
    """The runs in a database; a context manager.

    Args:
        address: see Database.
        create: make it if it is absent.
    """

    def __init__(self, address: str = "auto", *, create: bool = False) -> None:
        self._database = Database(address, create=create)
        self.name = self._database.name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def add(self, record: Record, source: str) -> Outcome:
        """Store a run, whole or not at all.

        A run that is present is replaced only if it was interrupted and this record has more.

        Args:
            record: of a job that has ended, or was killed.
            source: the folder from which it was read.
        """
        values = _columns(record, source)
        same = RUNS.c.id == values["id"]
        with self._database.writing() as connection:
            old = connection.execute(
                sa.select(RUNS.c.is_complete, RUNS.c.verdicts).where(same)
            ).one_or_none()
            if old is not None:
                if (values["is_complete"], values["verdicts"]) <= tuple(old):
                    return "present"
                connection.execute(sa.delete(RUNS).where(same))
            connection.execute(sa.insert(RUNS).values(values))
        return "added" if old is None else "replaced"

    def runs(self, chosen: Filter = ALL) -> list[Run]:
        """The runs without their records, sorted by time."""
        names = [column for column in RUNS.c if column.name in Run.__dataclass_fields__]
        with self._database.reading() as connection:
            rows = connection.execute(_select(chosen, *names)).all()
        return [Run(**{**row._mapping, "statuses": json.loads(row.statuses)}) for row in rows]

    def records(self, chosen: Filter = ALL) -> Iterator[Record]:
        """The records of runs, sorted by time. One is in memory at a time."""
        with self._database.reading() as connection:
            ids = connection.execute(_select(chosen, RUNS.c.id)).scalars().all()
        for id_ in ids:
            # A transaction each: an open one would keep writers waiting while the caller works.
            with self._database.reading() as connection:
                row = connection.execute(sa.select(RUNS).where(RUNS.c.id == id_)).one()
            yield self._record(row)

    def find(self, prefix: str) -> Record:
        """The record of the run whose id begins with these characters.

        Raises:
            ConfigError: there is none, or more than one.
        """
        with self._database.reading() as connection:
            query = sa.select(RUNS).where(RUNS.c.id.startswith(prefix, autoescape=True)).limit(2)
            rows = connection.execute(query).all()
        if len(rows) != 1:
            fact = "several runs" if rows else "no run"
            raise ConfigError(
                f"{fact} in {self.name} with an id that begins with {prefix}",
                hint="paprscm history list",
            )
        return self._record(rows[0])

    def _record(self, row: Row[Any]) -> Record:
        name = f"the record of run {row.id} in {self.name}"
        try:
            return decode(zstandard.ZstdDecompressor().decompress(row.record), name)
        except zstandard.ZstdError as error:
            raise ConfigError(
                f"{name} is damaged: {error}", hint="restore a copy of the database"
            ) from error


def _columns(record: Record, source: str) -> dict[str, Any]:
    try:
        started_s = datetime.fromisoformat(record.job.start).timestamp()
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{source}: the start of the job is {record.job.start!r}") from error
    main = _main_environment(record)
    statuses = tally.statuses(record)
    values = {
        "id": run_id(record),
        "started_s": started_s,
        "imported_s": time.time(),
        "source": source,
        "is_complete": record.job.end is not None,
        "verdicts": len(record.tests) - statuses["INTERRUPTED"],
        "kernel": main.kernel.release if main and main.kernel else "",
        "qemu": main.qemu.version.split(" ")[0] if main else "",
        "host": f"{record.host.cpu}, {record.host.cores} cores",
        "suite": f"{record.suite.version} {(record.suite.commit or '')[:12]}".strip(),
        "statuses": json.dumps({status: statuses[status] for status in tally.ORDER}),
        "record": zstandard.ZstdCompressor(level=9, write_checksum=True).compress(encode(record)),
    }
    # PostgreSQL has no NUL in texts.
    return {k: v.replace("\0", "\ufffd") if isinstance(v, str) else v for k, v in values.items()}


def _main_environment(record: Record) -> Environment | None:
    """The environment of most tests; one with a kernel comes first."""
    keys = [test.environment for test in record.tests if test.environment is not None]
    ranks = [(record.environments[k].kernel is not None, keys.count(k), k) for k in set(keys)]
    return record.environments[max(ranks)[2]] if ranks else None


def _select(chosen: Filter, *columns: Any) -> sa.Select[Any]:
    conditions: list[sa.ColumnElement[bool]] = []
    if chosen.since_s is not None:
        conditions.append(RUNS.c.started_s >= chosen.since_s)
    if chosen.until_s is not None:
        conditions.append(RUNS.c.started_s < chosen.until_s)
    if chosen.kernel:
        conditions.append(RUNS.c.kernel.startswith(chosen.kernel, autoescape=True))
    if chosen.qemu:
        conditions.append(RUNS.c.qemu.startswith(chosen.qemu, autoescape=True))
    if chosen.host:
        conditions.append(RUNS.c.host.contains(chosen.host, autoescape=True))
    order = (RUNS.c.started_s, RUNS.c.id)
    if chosen.last is not None:
        latest = sa.select(RUNS.c.id).where(*conditions)
        latest = latest.order_by(*(column.desc() for column in order)).limit(chosen.last)
        conditions = [RUNS.c.id.in_(latest)]
    return sa.select(*columns).where(*conditions).order_by(*order)
