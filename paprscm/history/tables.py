# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables of the database, in the version that this code reads and writes.

A run is stored as its whole record; the other columns are what queries select and sort by, and can
be computed from it again. A change needs a module in migrations/versions/.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    Boolean,
    Column,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

HEAD: Final = "0002"
"""The newest module of migrations/versions/."""
VERSION_TABLE: Final = "paprscm_version"
"""Alembic's table of the version; it also marks a database as that of paprscm."""
METADATA: Final = MetaData()

RUNS: Final = Table(
    "runs",
    METADATA,
    # run_id() of the record.
    Column("id", Text, primary_key=True),
    # Seconds since the epoch, by the clock of the job's host.
    Column("started_s", Double, nullable=False, index=True),
    Column("imported_s", Double, nullable=False),
    # The folder that was imported.
    Column("source", Text, nullable=False),
    # The job has ended, it was not killed.
    Column("is_complete", Boolean, nullable=False),
    # Number of tests that were not interrupted.
    Column("verdicts", Integer, nullable=False),
    # Releases of kernel and QEMU in the environment of most tests; "": no test has one.
    Column("kernel", Text, nullable=False),
    Column("qemu", Text, nullable=False),
    Column("host", Text, nullable=False),
    # Version and commit.
    Column("suite", Text, nullable=False),
    # JSON: number of tests by status.
    Column("statuses", Text, nullable=False),
    # The document of results/record.py, compressed by zstd with a checksum.
    Column("record", LargeBinary, nullable=False),
)

VERDICTS: Final = Table(
    "verdicts",
    METADATA,
    Column("run", Text, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    # Index of the test in the record; names can be repeated.
    Column("number", Integer, primary_key=True),
    Column("test", Text, nullable=False),
    Column("status", Text, nullable=False),
    # Digest of what may change a verdict: environment, parameters, commit of the suite.
    Column("conditions", Text, nullable=False),
)
