# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows of the database from the record of a run."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Any

import sqlalchemy as sa
import zstandard
from sqlalchemy.engine import Connection

from paprscm.errors import ConfigError
from paprscm.history.conditions import conditions_of_test
from paprscm.history.runs import main_environment, run_id
from paprscm.history.tables import RUNS, VERDICTS
from paprscm.results import tally
from paprscm.results.record import Environment, Record, decode, encode


def unpack(data: bytes, name: str) -> Record:
    """The record in a row.

    Args:
        data: the column `record`.
        name: its name in messages.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return decode(zstandard.ZstdDecompressor().decompress(data), name)
    except zstandard.ZstdError as error:
        raise ConfigError(
            f"{name} is damaged: {error}", hint="restore a copy of the database"
        ) from error


def run_row(record: Record) -> dict[str, Any]:
    """The columns of RUNS that depend on the record.

    Raises:
        ConfigError: the start of the job is not a time.
    """
    try:
        started_s = datetime.fromisoformat(record.job.start).timestamp()
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"the start of job {record.job.id} is not a time: {record.job.start!r}"
        ) from error
    main = main_environment(record)
    statuses = tally.statuses(record)
    values = {
        "id": run_id(record),
        "started_s": started_s,
        "is_complete": record.job.end is not None,
        "verdicts": len(record.tests) - statuses["INTERRUPTED"],
        "kernel": main.kernel.release if main and main.kernel else "",
        "qemu": main.qemu.version.split(" ")[0] if main else "",
        "host": f"{record.host.cpu}, {record.host.cores} cores",
        "suite": f"{record.suite.version} {(record.suite.commit or '')[:12]}".strip(),
        "statuses": json.dumps({status: statuses[status] for status in tally.ORDER}),
        "record": zstandard.ZstdCompressor(level=9, write_checksum=True).compress(encode(record)),
    }
    return {k: _text(v) if isinstance(v, str) else v for k, v in values.items()}


def verdict_rows(record: Record) -> list[dict[str, Any]]:
    """The rows of VERDICTS."""
    digests = {key: _conditions(record, one) for key, one in record.environments.items()}
    digests[""] = _conditions(record, None)
    keys = [test.environment for test in record.tests if test.environment is not None]
    usual = max(keys, key=keys.count) if keys else ""
    return [
        {
            "run": _text(run_id(record)),
            "number": number,
            "test": _text(test.name),
            "status": test.status,
            # A test whose process was killed has no environment of its own.
            "conditions": digests[test.environment or usual],
        }
        for number, test in enumerate(record.tests)
    ]


def rebuild(connection: Connection, name: str) -> None:
    """Compute all rows again from the records, after a migration.

    Args:
        connection: in the transaction of the migration.
        name: of the database, for messages.

    Raises:
        ConfigError: a record is damaged.
    """
    connection.execute(sa.delete(VERDICTS))
    for id_ in connection.execute(sa.select(RUNS.c.id)).scalars().all():
        query = sa.select(RUNS.c.record).where(RUNS.c.id == id_)
        record = unpack(
            connection.execute(query).scalar_one(), f"the record of run {id_} in {name}"
        )
        connection.execute(sa.update(RUNS).where(RUNS.c.id == id_).values(run_row(record)))
        if rows := verdict_rows(record):
            connection.execute(sa.insert(VERDICTS), rows)


def _conditions(record: Record, environment: Environment | None) -> str:
    words = conditions_of_test(record, environment)
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]


def _text(text: str) -> str:
    # PostgreSQL has no NUL in texts.
    return text.replace("\0", "\ufffd")
