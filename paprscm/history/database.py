# SPDX-License-Identifier: GPL-2.0-or-later
"""The database of runs: an SQLite file, or a database of PostgreSQL.

All transactions that write are serialized, by SQLite's BEGIN IMMEDIATE and an advisory lock of
PostgreSQL; so are migrations, which are a part of the first transaction of a newer paprscm.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from paprscm.errors import ConfigError, Error, HostError
from paprscm.history.rows import rebuild
from paprscm.history.tables import HEAD, METADATA, VERSION_TABLE
from paprscm.log import logger
from paprscm.results.text import one_line
from paprscm.settings import expanded

_PATIENCE_S = 60
"""Time to wait for other writers."""
_LOCK_KEY = 0x7061707273636D
"""Of the advisory lock: the bytes of "paprscm"."""
_HEADER: Final = b"SQLite format 3\0"
_MIGRATIONS: Final = Path(__file__).with_name("migrations")


def default_file() -> Path:
    """The file of the setting database=auto, in the user's folder for data (XDG)."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else expanded(Path("~/.local/share"))) / "paprscm/history.sqlite"


class Database:
    """A database of runs.

    Args:
        address: "auto", a path, or a URL of SQLAlchemy for sqlite or postgresql.
        create: make a missing SQLite file, or the tables in an empty database.

    Raises:
        Error: it is absent, damaged, of a newer paprscm, not of paprscm, or cannot be reached.
    """

    def __init__(self, address: str, *, create: bool = False) -> None:
        url = _url(address)
        self.file = Path(url.database or "") if url.drivername == "sqlite" else None
        self.name = str(self.file) if self.file else url.render_as_string(hide_password=True)
        """For messages."""
        if self.file is not None:
            if create:
                self.file.parent.mkdir(parents=True, exist_ok=True)
            elif not self.file.exists():
                raise self._absent()
            # SQLite takes a file of less than a page for an empty one, and would replace it.
            if self.file.exists() and (head := _head(self.file)) not in (b"", _HEADER):
                raise self._damaged(f"file is not a database: it begins with {head!r}")
        self._engine = _engine(url)
        try:
            self._check(create=create)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database."""
        with self._explained(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """The transaction of the only writer; committed at the end, rolled back by an exception."""
        with (
            self._explained(),
            self._engine.connect().execution_options(writes=True) as connection,
            connection.begin(),
        ):
            if self.file is None:
                connection.execute(sa.text(f"SET LOCAL lock_timeout = '{_PATIENCE_S}s'"))
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))
            yield connection

    def _check(self, *, create: bool) -> None:
        with self.reading() as connection:
            if self.file is not None:
                fault = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
                if fault != "ok":
                    raise self._damaged(str(fault))
            version = self._version(connection)
        if version == HEAD:
            return
        if version is None and not create:
            raise self._absent()
        with self.writing() as connection:
            # Another process may have migrated it meanwhile.
            if (version := self._version(connection)) != HEAD:
                self._migrate(connection, version)

    def _version(self, connection: Connection) -> str | None:
        """Version of the schema; None for an empty database."""
        tables = set(sa.inspect(connection).get_table_names())
        if VERSION_TABLE in tables:
            table = sa.table(VERSION_TABLE, sa.column("version_num"))
            version = connection.execute(sa.select(table.c.version_num)).scalar()
            if version is None:
                raise self._damaged("it does not have the version of its schema")
            missing = set(METADATA.tables) - tables
            if version == HEAD and missing:
                raise self._damaged(f"it does not have the table {min(missing)}")
            return str(version)
        if tables:
            raise ConfigError(
                f"{self.name} is not a history of paprscm: it has the table {min(tables)}",
                hint="give another file or database",
            )
        return None

    def _migrate(self, connection: Connection, version: str | None) -> None:
        # Slow to import.
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        revisions = {r.revision for r in ScriptDirectory.from_config(config).walk_revisions()}
        if version is not None:
            if version not in revisions:
                raise ConfigError(
                    f"{self.name} has the schema {version}; this paprscm reads {HEAD}",
                    hint="use the version of paprscm that wrote it",
                )
            if self.file is not None:
                backup = self._back_up(self.file, version)
                logger.info("%s: migrated to schema %s; backup: %s", self.name, HEAD, backup)
        command.upgrade(config, "head")
        rebuild(connection, self.name)

    @staticmethod
    def _back_up(file: Path, version: str) -> Path:
        """Copy the file; a backup of this version that is already there stays."""
        number, backup = 1, file.with_name(f"{file.name}.schema-{version}")
        while backup.exists():
            number += 1
            backup = file.with_name(f"{file.name}.schema-{version}.{number}")
        part = backup.with_name(f".{backup.name}.{os.getpid()}")
        try:
            with (
                contextlib.closing(
                    sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)
                ) as source,
                contextlib.closing(sqlite3.connect(part)) as target,
            ):
                source.backup(target)
            part.rename(backup)
        except sqlite3.Error as error:
            raise HostError(f"{backup} cannot be written: {error}") from error
        finally:
            part.unlink(missing_ok=True)
        return backup

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the database as errors of paprscm."""
        try:
            yield
        except DBAPIError as error:
            raise self._explain(error) from error

    def _explain(self, error: DBAPIError) -> Error:
        text = one_line(str(error.orig))
        if "locked" in text or "lock timeout" in text:
            return HostError(
                f"{self.name} is locked by another process for {_PATIENCE_S} s",
                hint="repeat the command",
            )
        if "malformed" in text or "not a database" in text:
            return self._damaged(text)
        return HostError(f"{self.name}: {text}")

    def _damaged(self, fact: str) -> ConfigError:
        return ConfigError(
            f"{self.name} is damaged: {fact}",
            hint="move it away, and restore a copy or import the runs' folders again",
        )

    def _absent(self) -> ConfigError:
        return ConfigError(
            f"{self.name} has no history", hint="paprscm history import FOLDER makes it"
        )


def _head(file: Path) -> bytes:
    with file.open("rb") as data:
        return data.read(len(_HEADER))


def _url(address: str) -> URL:
    if "://" not in address:
        path = default_file() if address == "auto" else expanded(Path(address))
        return URL.create("sqlite", database=str(path))
    try:
        url = make_url(address)
    except ArgumentError as error:
        raise ConfigError(
            "the database's address cannot be read", hint="postgresql://USER@HOST/NAME, or a path"
        ) from error
    kind = url.get_backend_name()
    if kind not in ("sqlite", "postgresql"):
        raise ConfigError(f"database={kind}://… is not supported", hint="sqlite or postgresql")
    if url.password is not None:
        # It would be in records, logs and the list of processes.
        raise ConfigError(
            "the database's address has a password", hint="set PGPASSWORD, or use ~/.pgpass"
        )
    if kind == "sqlite" and not url.database:
        raise ConfigError("the database's address names no file", hint="sqlite:////PATH")
    return url.set(drivername="sqlite" if kind == "sqlite" else "postgresql+psycopg")


def _engine(url: URL) -> Engine:
    if url.drivername != "sqlite":
        return sa.create_engine(url, connect_args={"connect_timeout": 10})
    engine = sa.create_engine(url, connect_args={"timeout": _PATIENCE_S})

    def connect(connection: Any, _record: object) -> None:
        # Python's module would begin transactions by itself, and not before DDL.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")

    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", begin)
    return engine
