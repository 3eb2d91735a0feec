# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions of SQLite by guest_tools/databases.c on the host, and the verdict on databases."""

from __future__ import annotations

import ctypes.util
import sqlite3
import subprocess
from pathlib import Path

import pytest
from guest_tool import FOR_THE_GUEST, compile_on_host, is_ppc64le

from paprscm.guest.report import read_report
from paprscm.power_cut.databases import (
    KINDS,
    DatabaseReport,
    Kind,
    _CheckReport,
    _RunReport,
    differences,
)

COUNT = 8


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_on_host("databases", tmp_path_factory.mktemp("databases") / "databases")


@pytest.fixture
def library() -> str:
    name = ctypes.util.find_library("sqlite3")
    if name is None:
        pytest.skip("no libsqlite3 on this machine")
    return name


def run(binary: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([binary, *words], capture_output=True, text=True, check=False)


def check(binary: Path, kind: str, library: str, file: Path) -> DatabaseReport:
    done = run(binary, "check", kind, library, file)
    (database,) = read_report(_CheckReport, done.stdout, done.returncode, done.stderr).databases
    return database


@pytest.mark.parametrize("kind", ["sqlite-wal", "sqlite-delete"])
def test_transactions_of_sqlite(binary: Path, library: str, kind: Kind, tmp_path: Path) -> None:
    counter, file = tmp_path / "counter", tmp_path / "database"
    counter.write_bytes(bytes(2 << 20))
    for count in (0, COUNT):
        done = run(binary, "run", kind, library, file, counter, str(count))
        assert not read_report(_RunReport, done.stdout, done.returncode, done.stderr).error
    assert counter.read_bytes()[:8] == COUNT.to_bytes(8, "little")
    assert check(binary, kind, library, file) == DatabaseReport(kind=kind, last=COUNT, error="")
    for change in ("DELETE FROM rows WHERE n = 6", "UPDATE rows SET content = 'x' WHERE n = 7"):
        copy = tmp_path / "copy"
        with sqlite3.connect(file) as source, sqlite3.connect(copy) as target:
            source.backup(target)
            target.execute(change)
        source.close()
        target.close()
        assert check(binary, kind, library, copy).error == "rows: not as committed"
        copy.unlink()
    file.write_bytes(file.read_bytes()[:4096] + bytes(4096) * 2)
    assert check(binary, kind, library, file).error


def test_the_tool_compiles_for_the_guest(tmp_path: Path) -> None:
    binary = compile_on_host("databases", tmp_path / "databases", compiler=FOR_THE_GUEST)
    assert is_ppc64le(binary)


def reports(*lasts: int) -> tuple[DatabaseReport, ...]:
    return tuple(
        DatabaseReport(kind=kind, last=last, error="")
        for kind, last in zip(KINDS, lasts, strict=True)
    )


@pytest.mark.parametrize(
    ("done", "lasts"),
    [
        (0, (0, 0, 0, 0)),
        (0, (1, 0, 0, 0)),
        (8, (8, 0, 0, 0)),
        (8, (8, 1, 0, 0)),
        (18, (8, 8, 3, 0)),
        (32, (8, 8, 8, 8)),
    ],
)
def test_committed_transactions_and_perhaps_the_next(done: int, lasts: tuple[int, ...]) -> None:
    assert differences(reports(*lasts), done, COUNT) == []


@pytest.mark.parametrize(
    ("done", "lasts", "text"),
    [
        (3, (2, 0, 0, 0), "sqlite-wal: the last transaction is 2, not 3 or 4"),
        (3, (5, 0, 0, 0), "sqlite-wal: the last transaction is 5, not 3 or 4"),
        (9, (7, 1, 0, 0), "sqlite-wal: the last transaction is 7, not 8"),
        (9, (8, 1, 1, 0), "lmdb: the last transaction is 1, not 0"),
    ],
)
def test_other_transactions_are_reported(done: int, lasts: tuple[int, ...], text: str) -> None:
    assert differences(reports(*lasts), done, COUNT) == [text]


def test_a_broken_database_is_reported() -> None:
    broken = DatabaseReport(kind="lmdb", last=0, error="mdb_env_open: No such file")
    found = (*reports(0, 0, 0, 0)[:2], broken, *reports(0, 0, 0, 0)[3:])
    assert differences(found, 0, COUNT) == ["lmdb: mdb_env_open: No such file"]
