# SPDX-License-Identifier: GPL-2.0-or-later
"""Databases for the selftests of the history: SQLite files, and a real PostgreSQL."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

USER = "history"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """Folder of the socket of a PostgreSQL of this session; skips without one."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    on_path = shutil.which("postgres")
    if not programs and on_path is None:
        pytest.skip("there is no PostgreSQL here (Debian: postgresql)")
    postgres = programs[-1] if programs else Path(str(on_path)).resolve()
    folder = Path(tempfile.mkdtemp(prefix="paprscm-postgres-"))
    words: list[str] = []
    if os.getuid() == 0:
        # It refuses to be run by root.
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        ids = [f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
        words = ["setpriv", *ids, "--pdeathsig=INT"]
    try:
        options = ["-D", str(folder / "data"), "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync"]
        made = [*words, str(postgres.with_name("initdb")), *options, "--locale=C"]
        subprocess.run(made, check=True, capture_output=True, cwd=folder)
        options = ["-D", str(folder / "data"), "-k", str(folder), "-c", "listen_addresses="]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [*words, str(postgres), *options, "-F"], stdout=log, stderr=log, cwd=folder
            )
        try:
            _wait_for(folder, server)
            yield folder
        finally:
            # Fast shutdown.
            server.send_signal(signal.SIGINT)
            server.wait(60)
    finally:
        shutil.rmtree(folder)


def _wait_for(folder: Path, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(host=str(folder), user=USER, dbname="postgres").close()
        except psycopg.OperationalError:
            log = (folder / "log").read_text()
            assert server.poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.05)
        else:
            return


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Address of a database that does not exist, or is empty."""
    if request.param == "sqlite":
        return str(tmp_path / "history.sqlite")
    folder: Path = request.getfixturevalue("cluster")
    name = f"h{uuid.uuid4().hex}"
    with psycopg.connect(host=str(folder), user=USER, dbname="postgres", autocommit=True) as one:
        one.execute(f'CREATE DATABASE "{name}"'.encode())
    return f"postgresql://{USER}@/{name}?host={folder}"
