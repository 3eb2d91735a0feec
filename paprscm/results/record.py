# SPDX-License-Identifier: GPL-2.0-or-later
"""The record of a job: its tests, the environments in which they ran, and their measurements.

It is one JSON document in the job's folder. docs/results.md describes it, and record.schema.json
is its JSON Schema, generated from these classes. A reader ignores fields that it does not know, so
a new field with a default does not need a new version.
"""

from __future__ import annotations

import fcntl
import functools
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

import msgspec

from paprscm.errors import ConfigError

SCHEMA: Final = "paprscm-results/1"
FILE: Final = "record.json"
"""Name of the document in the job's folder; results.json there is Avocado's own."""

Status = Literal[
    "PASS", "WARN", "FAIL", "ERROR", "CANCEL", "SKIP", "INTERRUPTED", "RUNNING", "PLANNED"
]
"""The verdicts of DESIGN and Avocado. RUNNING and PLANNED occur only in the file of a job that has
not ended: read_record() returns INTERRUPTED for tests that never end."""

BROKEN: Final[tuple[Status, ...]] = ("FAIL", "ERROR", "INTERRUPTED")
"""Statuses of tests that have to be looked at, or run again."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A measured number. Metrics of one test with equal names and dimensions are repetitions."""

    name: str
    value: float
    unit: str
    """Such as "s", "us", "MiB" or "hcalls"; "1" for a ratio."""
    dimensions: dict[str, str] = field(default_factory=dict)
    """Distinguish it from other metrics of this name, such as {"fstype": "xfs"}."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"metric {self.name} is {self.value}, which JSON cannot hold")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of looking for one known issue in one test."""

    name: str
    """Name of its file in known_issues/, without the suffix."""
    title: str
    product: str
    """"QEMU", "Linux" or "Avocado"."""
    version: str
    """Version of the product in this test."""
    shows: bool
    found: str
    """The observation, in one sentence."""
    update: str | None = None
    """Request to update the issue's file: it is gone, or shows in an older version."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Start and duration of a test, and its time by activity."""

    start: str
    """ISO 8601, with the zone."""
    began_s: float
    """The start by the host's monotonic clock, for comparison within the job."""
    duration_s: float
    activities: dict[str, float] = field(default_factory=dict)
    """Seconds by activity (paprscm/timesheet.py); empty if the test process was killed."""
    counts: dict[str, int] = field(default_factory=dict)
    cpu_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """The kernel of the guests."""

    release: str
    path: str
    source: str
    """Package and version of the source of a kernel that was built here; "" for a user's own."""
    build_id: str | None
    config_sha256: str | None
    """Digest of the sorted options; None without IKCONFIG."""
    page_size_bytes: int | None
    mmu: str | None
    """"radix" or "hash": the kernel's choice on this CPU by its configuration, if that is known."""
    fixed_sites: int
    """Number of instructions that were rewritten for TCG."""


@dataclass(frozen=True, kw_only=True)
class Qemu:
    """The QEMU under test."""

    version: str
    path: str
    setting: str
    """Where it came from: "auto" (the host), "debian:SUITE" or a path."""
    sha256: str
    libpmem: bool
    """Built with libpmem."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a test ran on."""

    qemu: Qemu
    kernel: Kernel | None = None
    """None: the test judges QEMU without a guest kernel; so are the fields below."""
    userland: str | None = None
    accel: str | None = None
    cpu: str | None = None
    firmware: str | None = None
    machine: str | None = None
    """Machine type."""
    smp: int | None = None
    memory_mib: int | None = None
    snapshot: str | None = None
    """Key of the snapshot from which guests were restored."""
    settings: dict[str, str] = field(default_factory=dict)
    """Settings that differ from their defaults."""


@dataclass(frozen=True, kw_only=True)
class Test:
    """One test of the job."""

    # Not a class of tests for pytest.
    __test__ = False

    id: str
    """Unique in the job: Avocado's number and the test's path."""
    name: str
    """The same in all jobs and checkouts: "folder/file.py:Class.method", and the variant."""
    file: str
    subject: str
    """Folder of the file: map_sync, flush, …"""
    contract: str
    """First paragraph of the docstring."""
    status: Status
    reason: str = ""
    """Why it did not PASS."""
    hint: str = ""
    """The remedy, if one is known."""
    environment: str | None = None
    """Key in the record's `environments`; None: the test process was killed, or never started."""
    known_issues: tuple[Finding, ...] = ()
    metrics: tuple[Metric, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """Other observations, by name."""
    times: Times | None = None
    """None: it never started."""
    logs: tuple[str, ...] = ()
    """Paths relative to the job's folder: the test's own log first, then consoles."""
    command: str = ""
    """Command line that runs this test again."""

    @property
    def console(self) -> str | None:
        """The console's log of its last guest."""
        return next((log for log in reversed(self.logs) if log.endswith("/console.log")), None)

    @property
    def shown(self) -> tuple[Finding, ...]:
        """The known issues that showed."""
        return tuple(issue for issue in self.known_issues if issue.shows)


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine on which the job ran."""

    cpu: str
    cores: int
    memory_mib: int
    machine: str
    """Architecture, as `uname -m`."""
    kernel: str
    distribution: str


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The version of the suite."""

    version: str
    commit: str | None
    """Git commit; None for an installed wheel."""
    modified: bool
    """The checkout has changes that are not committed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The job, as started by one command."""

    id: str
    start: str
    command: tuple[str, ...]
    folder: str
    """Working directory."""
    parameters: dict[str, str] = field(default_factory=dict)
    """Values of Avocado's option -p."""
    end: str | None = None
    """None: it runs, or was killed."""
    status: int | None = None
    """Exit status."""
    interruption: str | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """The results of one job."""

    schema: Literal["paprscm-results/1"] = SCHEMA
    job: Job
    host: Host
    suite: Suite
    environments: dict[str, Environment] = field(default_factory=dict)
    """By a digest of the content; each one is stored once."""
    tests: tuple[Test, ...] = ()

    def __post_init__(self) -> None:
        for test in self.tests:
            if test.environment is not None and test.environment not in self.environments:
                raise ValueError(f"{test.id} refers to an unknown environment {test.environment}")

    def environment(self, test: Test) -> Environment | None:
        """The test's environment; that of most tests if it did not report its own."""
        if test.environment is None:
            keys = [other.environment for other in self.tests if other.environment is not None]
            return self.environments[max(keys, key=keys.count)] if keys else None
        return self.environments[test.environment]


def encode(record: Record) -> bytes:
    """The document; its fields are in the order of the classes."""
    return msgspec.json.encode(record) + b"\n"


@functools.cache
def _decoder() -> msgspec.json.Decoder[Record]:
    return msgspec.json.Decoder(Record)


def schema() -> dict[str, Any]:
    """JSON Schema of the document."""
    body = msgspec.json.schema(Record)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Results of one job, {SCHEMA}",
    }
    # The round trip turns tuples into lists, as in the file.
    return cast(dict[str, Any], msgspec.json.decode(msgspec.json.encode({**head, **body})))


def read_record(path: Path) -> Record:
    """Read the record of a job that has ended, or was killed.

    Args:
        path: the job's folder, such as results/latest, or the document itself.

    Raises:
        ConfigError: it is not a job's folder, the job still runs, or the document cannot be read.
    """
    document = path if path.is_file() else path / FILE
    record = _read(document)
    if record.job.end is not None:
        return record
    if _is_locked(document.parent):
        ended = sum(test.status not in ("RUNNING", "PLANNED") for test in record.tests)
        raise ConfigError(
            f"{document.parent}: the job still runs; {ended} of {len(record.tests)} tests have "
            "ended",
            hint="wait for its end, or interrupt it",
        )
    # The job may have ended between the two lines above.
    record = _read(document)
    return record if record.job.end is not None else closed(record, "the job was killed")


def closed(record: Record, cause: str) -> Record:
    """The record of a job whose tests do not go on: those without a verdict are INTERRUPTED."""
    reasons = {"RUNNING": f"{cause} while this test ran", "PLANNED": f"not started: {cause}"}
    tests = (
        replace(test, status="INTERRUPTED", reason=reasons[test.status])
        if test.status in reasons
        else test
        for test in record.tests
    )
    return replace(record, tests=tuple(tests))


def _read(document: Path) -> Record:
    try:
        data = document.read_bytes()
    except OSError as error:
        raise _absent(document, error) from error
    return decode(data, str(document))


def decode(data: bytes, name: str) -> Record:
    """The record of a document; encode() is the inverse.

    Args:
        data: the document.
        name: its name in messages.

    Raises:
        ConfigError: it is damaged, or of another version.
    """
    try:
        version = msgspec.json.decode(data, type=_Head).schema
        if version != SCHEMA:
            raise ConfigError(
                f"{name} has the schema {version!r}; this paprscm reads {SCHEMA!r}",
                hint="use the version of paprscm that wrote it",
            )
        return _decoder().decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"{name} is damaged: {error}", hint="copy the job's folder again"
        ) from error


@dataclass(frozen=True)
class _Head:
    schema: str


def _absent(document: Path, error: OSError) -> ConfigError:
    folder = document.parent
    if not folder.exists():
        return ConfigError(f"{folder} does not exist", hint="give a job's folder: results/latest")
    if not folder.is_dir():
        return ConfigError(f"{folder} is not a folder", hint="give a job's folder: results/latest")
    if document.exists():
        return ConfigError(f"{document} cannot be read: {error.strerror}")
    if (folder / "jobdata").is_dir() or (folder / "job.log").exists():
        return ConfigError(
            f"{folder} is a job's folder without {FILE}",
            hint="the job ended before its first test, had no test of this suite, or was run by an "
            "earlier version",
        )
    return ConfigError(
        f"{folder} is not a job's folder: it has no {FILE}", hint="such as results/latest"
    )


def lock(folder: Path) -> int:
    """Mark a job's folder as that of a running job, until the handle is closed or the process ends.

    Returns:
        The handle, which children do not inherit.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def _is_locked(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def updates(tests: Iterable[Test]) -> list[str]:
    """Requests to update files of known issues, one sentence each.

    An issue that shows in one test of a job is not gone in that version, even if it does not show
    in another.
    """
    findings = [finding for test in tests for finding in test.known_issues]
    showing = {(finding.name, finding.version) for finding in findings if finding.shows}
    return sorted(
        {
            finding.update
            for finding in findings
            if finding.update and (finding.shows or (finding.name, finding.version) not in showing)
        }
    )
