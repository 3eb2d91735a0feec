# SPDX-License-Identifier: GPL-2.0-or-later
"""The database: its versions, damaged and foreign ones, several writers."""

from __future__ import annotations

import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from records import example, make_record, make_test

from paprscm.errors import ConfigError, HostError
from paprscm.history import database, tables
from paprscm.history.database import Database, default_file
from paprscm.history.store import History
from paprscm.results.record import encode


def versions() -> list[str]:
    """The schema's versions, the newest first."""
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    return [one.revision for one in ScriptDirectory.from_config(config).walk_revisions()]


@pytest.fixture
def filled(address: str) -> Iterator[str]:
    """A database with a run."""
    with History(address, create=True) as history:
        history.add(example(), "/a")
    yield address


def execute(address: str, *statements: str) -> None:
    """Change a database behind the back of the library."""
    engine = database._engine(database._url(address))
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        for statement in statements:
            connection.execute(sa.text(statement))
    engine.dispose()


def downgrade_to_0001(address: str) -> None:
    """Make the database what the version 0001 has left."""
    execute(
        address,
        "DROP TABLE verdicts",
        "UPDATE paprscm_version SET version_num = '0001'",
        # Rows of another version.
        "UPDATE runs SET kernel = 'old', statuses = '{}'",
    )


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_migrations_make_the_tables_that_the_code_uses(address: str) -> None:
    assert versions()[0] == tables.HEAD
    with History(address, create=True) as history, history._database.reading() as connection:
        options = {"version_table": tables.VERSION_TABLE}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, tables.METADATA) == []


def test_an_older_schema_is_migrated_after_a_backup(filled: str, tmp_path: Path) -> None:
    downgrade_to_0001(filled)
    with History(filled) as history:
        assert list(history.records()) == [example()]
        assert [run.kernel for run in history.runs()] == ["6.12.117-paprscm"]
        assert len(list(history.verdicts())) == len(example().tests)
        assert history.add(example(), "") == "present"
    if filled.startswith("postgresql"):
        return
    backup = tmp_path / "history.sqlite.schema-0001"
    assert files(tmp_path) == ["history.sqlite", backup.name]
    with closing(sqlite3.connect(backup)) as old:
        assert old.execute("SELECT version_num FROM paprscm_version").fetchall() == [("0001",)]
        assert old.execute("SELECT kernel FROM runs").fetchall() == [("old",)]
    # Another one does not replace it.
    downgrade_to_0001(filled)
    with History(filled):
        pass
    assert files(tmp_path) == ["history.sqlite", backup.name, f"{backup.name}.2"]


def test_a_migration_by_another_process_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = str(tmp_path / "h")
    with History(address, create=True) as history:
        history.add(example(), "")
    downgrade_to_0001(address)
    waiting = threading.Event()
    writing = Database.writing

    def announced(self: Database) -> AbstractContextManager[sa.Connection]:
        waiting.set()
        return writing(self)

    monkeypatch.setattr(Database, "writing", announced)
    engine = database._engine(database._url(address))
    with ThreadPoolExecutor(1) as pool:
        with engine.connect().execution_options(writes=True) as connection, connection.begin():
            tables.VERDICTS.create(connection)
            connection.execute(sa.text("UPDATE paprscm_version SET version_num = '0002'"))
            opened = pool.submit(History, address)
            assert waiting.wait(60)
        with opened.result() as history:
            assert list(history.records()) == [example()]
    engine.dispose()
    assert files(tmp_path) == ["h"]


def test_a_migration_that_fails_changes_nothing(
    filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    downgrade_to_0001(filled)

    def fail(*_: object) -> None:
        raise ConfigError("the record of run 1 is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(database, "rebuild", fail)
        with pytest.raises(ConfigError, match="the record of run 1 is damaged"):
            History(filled)
    execute(filled, "CREATE TABLE verdicts (id INTEGER)", "DROP TABLE verdicts")
    with History(filled) as history:
        assert list(history.records()) == [example()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("UPDATE paprscm_version SET version_num = '9999'", "has the schema 9999; this paprscm"),
        ("DELETE FROM paprscm_version", "is damaged: it does not have the version"),
        ("DROP TABLE verdicts", "is damaged: it does not have the table verdicts"),
    ],
)
def test_a_database_that_this_version_cannot_read(
    filled: str, tmp_path: Path, change: str, message: str
) -> None:
    execute(filled, change)
    before = files(tmp_path)
    for create in (False, True):
        with pytest.raises(ConfigError, match=message):
            History(filled, create=create)
    assert files(tmp_path) == before


def test_a_foreign_database_is_refused(address: str) -> None:
    execute(address, "CREATE TABLE customers (id INTEGER)")
    for create in (False, True):
        with pytest.raises(ConfigError, match=r"is not a history of paprscm: it has .* customers"):
            History(address, create=create)


def test_an_absent_database_is_made_by_an_import_only(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no history"):
        History(address)
    assert files(tmp_path) == []
    with History(address, create=True) as history:
        assert list(history.records()) == []


def test_a_file_that_is_not_a_database(tmp_path: Path) -> None:
    for content in (b"x", b"SQLite", b"hello world\n" * 1000):
        file = tmp_path / "h"
        file.write_bytes(content)
        for create in (False, True):
            with pytest.raises(ConfigError, match="is damaged: file is not a database"):
                History(str(file), create=create)
        assert file.read_bytes() == content


def test_a_damaged_file_is_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "h"
    with History(str(file), create=True) as history:
        for number in range(20):
            tests = [make_test(f"{number}_{i}" * 20) for i in range(100)]
            history.add(make_record(*tests, id=str(number)), "")
    whole = file.read_bytes()
    middle = len(whole) // 2
    for damaged in (
        whole[:middle] + b"\xff" * 20_000 + whole[middle + 20_000 :],
        whole[: middle + 100],
    ):
        file.write_bytes(damaged)
        for create in (False, True):
            with pytest.raises(ConfigError, match="is damaged: ") as caught:
                History(str(file), create=create)
            assert caught.value.hint is not None
        assert file.read_bytes() == damaged
    assert files(tmp_path) == ["h"]


def test_a_damaged_record_is_named(filled: str) -> None:
    blob = "x'00'" if not filled.startswith("postgresql") else "'\\x00'::bytea"
    execute(filled, f"UPDATE runs SET record = {blob}")  # noqa: S608
    with History(filled) as history, pytest.raises(ConfigError, match="record of run 1d2803ed@"):
        list(history.records())


def test_a_locked_database(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_PATIENCE_S", 1)
    with History(filled) as holder, History(filled) as other:
        with (
            holder._database.writing(),
            pytest.raises(HostError, match="is locked by another process for 1 s"),
        ):
            other.add(make_record(make_test("a"), id="2"), "")
        assert other.add(make_record(make_test("a"), id="2"), "") == "added"


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    address = str(tmp_path / "h")
    with History(address, create=True) as history:
        history.add(example(), "")

        @sa.event.listens_for(history._database._engine, "begin")
        def limit(connection: sa.Connection) -> None:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        tests = [make_test(f"{i}" * 500) for i in range(500)]
        with pytest.raises(HostError, match="database or disk is full"):
            history.add(make_record(*tests, id="2"), "")
    with History(address) as history:
        assert list(history.records()) == [example()]


def test_a_full_disk_before_a_migration(tmp_path: Path) -> None:
    address = str(tmp_path / "h")
    with History(address, create=True) as history:
        history.add(example(), "")
    downgrade_to_0001(address)
    before = (tmp_path / "h").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(HostError, match=r"h\.schema-0001 cannot be written: "):
            History(address)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == ["h"]
    assert (tmp_path / "h").read_bytes() == before
    with History(address) as history:
        assert list(history.records()) == [example()]


WRITER = """
import sys
from pathlib import Path
from paprscm.history.store import History
from paprscm.results.record import read_record
for path in sys.argv[2:]:
    with History(sys.argv[1], create=True) as history:
        print(history.add(read_record(Path(path)), path))
"""


def test_several_writers_at_once(address: str, tmp_path: Path) -> None:
    """Four processes make the database and import the same runs, in different orders."""
    folder = tmp_path / "records"
    folder.mkdir()
    paths = []
    for number in range(8):
        path = folder / f"{number}.json"
        path.write_bytes(encode(make_record(make_test("a"), make_test("b"), id=str(number))))
        paths.append(str(path))
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, address, *paths[shift:], *paths[:shift]],
            stdout=subprocess.PIPE,
            text=True,
        )
        for shift in range(0, 8, 2)
    ]
    words = " ".join(writer.communicate()[0] for writer in writers).split()
    assert [writer.returncode for writer in writers] == [0] * 4
    assert (words.count("added"), words.count("present")) == (8, 24)
    with History(address) as history:
        assert sorted(run.id[0] for run in history.runs()) == list("01234567")
        assert len(list(history.verdicts())) == 16


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("mysql://x/y", "database=mysql://… is not supported"),
        ("postgresql://u:secret@h/x", "the database's address has a password"),
        ("://", "the database's address cannot be read"),
        ("sqlite://", "names no file"),
    ],
)
def test_addresses_that_are_refused(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Database(address)
    assert "secret" not in str(caught.value)


def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"postgresql\+psycopg://u@/x.*: .*(failed|No such file)"):
        Database(f"postgresql://u@/x?host={tmp_path}")


def test_the_default_file_is_in_the_folder_for_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with History(create=True) as history:
        assert history.name == str(tmp_path / "paprscm/history.sqlite") == str(default_file())
    assert default_file().exists()
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_file() == Path("/home/someone/.local/share/paprscm/history.sqlite")
