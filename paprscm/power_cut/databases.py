# SPDX-License-Identifier: GPL-2.0-or-later
"""Databases on a DIMM: guest_tools/databases.c, with the libraries of Debian."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from paprscm.channel.command import CommandResult
from paprscm.debian.packages import ARCH, Archive, suites
from paprscm.debian.rootfs import find_rootfs
from paprscm.errors import CapabilityError, ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.report import Fields, Natural, ToolReport, check_report, read_report
from paprscm.guest.tools import install_tool, run_tool
from paprscm.settings import Settings

Kind = Literal["sqlite-wal", "sqlite-delete", "lmdb", "lmdb-map"]
_LIBRARIES: Final[Mapping[Kind, str]] = {
    "sqlite-wal": "libsqlite3.so.0",
    "sqlite-delete": "libsqlite3.so.0",
    "lmdb": "liblmdb.so.0",
    "lmdb-map": "liblmdb.so.0",
}
_PACKAGES: Final = ("libsqlite3-0", "liblmdb0")
_CACHE_KIND: Final = "databases"
_FOLDER: Final = "/run/databases"
"""Folder of the libraries in the guest."""
KINDS: Final = tuple(_LIBRARIES)


class _RunReport(ToolReport, frozen=True, kw_only=True):
    tool: Literal["databases"]
    verb: Literal["run"]
    error: str


class DatabaseReport(Fields, frozen=True, kw_only=True):
    """A database after a cut.

    Attributes:
        kind: its kind.
        last: number of its last transaction.
        error: empty if it is intact, and has exactly the rows of that transaction.
    """

    kind: Kind
    last: Natural
    error: str


class _CheckReport(ToolReport, frozen=True, kw_only=True):
    tool: Literal["databases"]
    verb: Literal["check"]
    databases: tuple[DatabaseReport, ...]


def fetch_libraries(settings: Settings) -> list[Path]:
    """Return the libraries of the userland's suite, which are downloaded once.

    Args:
        settings: the mirror, the cache, and the suite of the userland, which is in the cache.

    Raises:
        CapabilityError: they cannot be downloaded.
    """
    archive = Archive.of(settings)
    candidates = suites(settings.userland_suite)
    suite = next(suite for suite in candidates if find_rootfs(archive.cache, suite=suite))

    def fill(folder: Path) -> None:
        root = folder / "root"
        download = archive.download(
            _PACKAGES, suite=suite, arch=ARCH, title="databases", alone=True
        )
        download.unpack(root, title="databases")
        for name in set(_LIBRARIES.values()):
            (file,) = root.glob(f"usr/lib/*/{name}")
            shutil.copyfile(file, folder / name)
        shutil.rmtree(root)
        download.remove()

    fields = {"packages": " ".join(_PACKAGES), "suite": suite}
    try:
        folder = archive.cache.ensure(_CACHE_KIND, fields, fill).path
    except HostError as error:
        raise CapabilityError(
            f"SQLite and LMDB cannot be downloaded: {error.message}", hint=error.hint
        ) from error
    return [folder / name for name in sorted(set(_LIBRARIES.values()))]


@dataclass(frozen=True)
class Databases:
    """The databases in a folder of the guest, one of each kind.

    Attributes:
        guest: the guest.
        folder: the folder.
    """

    guest: Guest
    folder: str

    def install(self, libraries: list[Path]) -> None:
        """Copy the libraries into the guest."""
        for library in libraries:
            self.guest.succeed(
                f"mkdir -p {_FOLDER} && cat > {_FOLDER}/{library.name}", stdin=library.read_bytes()
            )

    def run(self, kind: Kind, counter: str, count: int) -> None:
        """Commit transactions; 0: make the database.

        Args:
            kind: kind of the database.
            counter: path of a DAX device, whose first word is the number of transactions so far.
            count: number of transactions.

        Raises:
            ContractError: a transaction failed.
        """
        words = ["run", *self._words(kind), counter, str(count)]
        result = run_tool(self.guest, "databases", words, timeout_s=120)
        report = read_report(_RunReport, result.stdout, result.status, result.stderr)
        if report.error:
            raise ContractError(f"{kind}: {report.error}")

    def check_command(self) -> list[str]:
        """A command of the guest that checks all databases, for read_check()."""
        words = [word for kind in KINDS for word in self._words(kind)]
        return [str(install_tool(self.guest, "databases")), "check", *words]

    def _words(self, kind: Kind) -> list[str]:
        return [kind, f"{_FOLDER}/{_LIBRARIES[kind]}", f"{self.folder}/{kind}"]


def read_check(result: CommandResult) -> tuple[DatabaseReport, ...]:
    """Return what check_command() has found."""
    report = read_report(_CheckReport, result.stdout, result.status, result.stderr)
    check_report([one.kind for one in report.databases] == list(KINDS), "other databases")
    return report.databases


def differences(reports: tuple[DatabaseReport, ...], done: int, count: int) -> list[str]:
    """Compare databases with the transactions that were committed.

    Args:
        reports: the databases, as a cut has left them.
        done: number of transactions that had returned, of all kinds, one after the other.
        count: number of transactions of each kind.
    """
    found = []
    for number, report in enumerate(reports):
        own = min(max(0, done - number * count), count)
        running = own < count and done >= number * count
        legal = [own, own + 1] if running else [own]
        if report.error:
            found.append(f"{report.kind}: {report.error}")
        elif report.last not in legal:
            expected = " or ".join(map(str, legal))
            found.append(f"{report.kind}: the last transaction is {report.last}, not {expected}")
    return found
