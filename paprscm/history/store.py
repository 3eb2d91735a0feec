# SPDX-License-Identifier: GPL-2.0-or-later
"""Records of runs in the database."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Literal, Self

import sqlalchemy as sa
from sqlalchemy.engine import Row

from paprscm.errors import ConfigError
from paprscm.history.database import Database
from paprscm.history.rows import run_row, unpack, verdict_rows
from paprscm.history.runs import ALL, Filter, Run
from paprscm.history.tables import RUNS, VERDICTS
from paprscm.results.record import Record

Outcome = Literal["added", "replaced", "present"]


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
        values = {**run_row(record), "imported_s": time.time(), "source": source}
        rows = verdict_rows(record)
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
            if rows:
                connection.execute(sa.insert(VERDICTS), rows)
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

    def verdicts(self, chosen: Filter = ALL) -> Iterator[tuple[str, str, str]]:
        """Name, digest of the conditions, and status of each test of runs, sorted by time."""
        ids = sa.select(_select(chosen, RUNS.c.id).subquery().c.id)
        query = (
            sa.select(VERDICTS.c.test, VERDICTS.c.conditions, VERDICTS.c.status)
            .join(RUNS, VERDICTS.c.run == RUNS.c.id)
            .where(RUNS.c.id.in_(ids))
            .order_by(RUNS.c.started_s, RUNS.c.id, VERDICTS.c.number)
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        for row in rows:
            yield tuple(row)

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
        return unpack(row.record, f"the record of run {row.id} in {self.name}")


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
