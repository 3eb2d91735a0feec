# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs in chronological order, and the tracks that they belong to.

A run is a job with its record. A track is a sequence of runs whose verdicts can be compared over
time: they have the same branch of Linux and of QEMU, and the same page size, MMU and CPU.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from paprscm.results.labels import describe, safe
from paprscm.results.record import Environment, Record, Status, Test, closed
from paprscm.results.tally import ORDER
from paprscm.results.text import plain, shortened

_BRANCH = re.compile(r"v?(\d+\.\d+)[.\d]*(?:-rc\d+)?(?:-\d+-g[0-9a-f]+)?(?:\+$)?(.*)", re.DOTALL)
_EPOCH = datetime.fromtimestamp(0, UTC)
_TEXT_LIMIT = 4000

Place = tuple[str, ...]
"""Properties of an environment that distinguish tracks: Linux, QEMU, page size, …"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A job in the site.

    Attributes:
        number: position in chronological order.
        record: its record; tests have no facts.
        key: name of its page, made from start and job id.
        start: None if the record's time cannot be read.
        track: name of the track.
        tests: its tests by name; the worst result if a test ran more than once.
    """

    number: int
    record: Record
    key: str
    start: datetime | None
    track: str
    tests: dict[str, Test]

    @property
    def time(self) -> str:
        """Start in UTC, for people."""
        if self.start is None:
            return "unknown time"
        return f"{self.start.astimezone(UTC):%Y-%m-%d %H:%M}"

    @property
    def duration_s(self) -> float | None:
        """None if the job was killed, or the clock was set back meanwhile."""
        end = _time(self.record.job.end or "")
        if self.start is None or end is None or end < self.start:
            return None
        return (end - self.start).total_seconds()

    @property
    def environment(self) -> Environment | None:
        """That of most tests; one with a guest kernel, if there is any."""
        return _environment(self.record)

    @functools.cached_property
    def host(self) -> str:
        """The machine on which it ran, for comparing times."""
        return f"{self.record.host.cpu}, {self.record.host.cores} cores"

    @property
    def versions(self) -> str:
        """Releases of Linux and QEMU, in a few words."""
        if (environment := self.environment) is None:
            return "unknown environment"
        qemu = f"QEMU {release(environment.qemu.version)}"
        kernel = environment.kernel
        return f"Linux {release(kernel.release)}, {qemu}" if kernel else qemu


def in_order(records: Iterable[Record]) -> list[Run]:
    """The runs of records, the oldest first. Of a job that occurs repeatedly, the last record."""
    jobs: dict[tuple[str, str], Record] = {}
    for record in records:
        jobs[record.job.id, record.job.start] = _prepared(record)
    ordered = sorted(jobs.values(), key=lambda r: (_time(r.job.start) or _EPOCH, r.job.id))
    tracks = track_names([_place(_environment(record)) for record in ordered])
    return [
        Run(
            number=number,
            record=record,
            key=_key(record),
            start=_time(record.job.start),
            track=track,
            tests=_by_name(record.tests),
        )
        for number, (record, track) in enumerate(zip(ordered, tracks, strict=True))
    ]


def is_verdict(test: Test) -> bool:
    """True if the status says something about the product or the suite."""
    return test.status not in ("CANCEL", "SKIP") and has_started(test)


def has_started(test: Test) -> bool:
    """False for the tests that a killed job did not reach."""
    return test.status != "INTERRUPTED" or test.times is not None


def track_names(places: Sequence[Place]) -> list[str]:
    """A name for each place: Linux and QEMU, and the properties that differ between places."""
    differing = [len(set(column)) > 1 for column in zip(*places, strict=True)]
    return [
        ", ".join(part for i, part in enumerate(place) if part and (i < 2 or differing[i]))
        or "unknown environment"
        for place in places
    ]


def changes(before: Run, after: Run, name: str) -> list[str]:
    """The differences between the environments of one test in two runs, in a few words each."""
    old, new = (describe_all(run, name) for run in (before, after))
    words = []
    for label, versions in (
        ("Linux", ("kernel", "kernel_source", "kernel_build_id", "kernel_config_sha256")),
        ("QEMU", ("qemu", "qemu_sha256")),
        ("userland", ("userland",)),
        ("firmware", ("firmware",)),
        ("suite", ("suite",)),
    ):
        first, *others = versions
        if old.get(first) != new.get(first):
            words.append(f"{label} {old.get(first, 'none')} → {new.get(first, 'none')}")
        elif any(old.get(version) != new.get(version) for version in others):
            words.append(f"{label} {new.get(first)} was built again")
    return words


def describe_all(run: Run, name: str = "") -> dict[str, str]:
    """Environment of a test, or of most tests, and version of the suite, as texts by name."""
    test = run.tests.get(name)
    environment = run.record.environment(test) if test else run.environment
    texts = describe(environment) if environment else {}
    texts |= {name: release(texts[name]) for name in ("kernel", "qemu") if name in texts}
    suite = run.record.suite
    commit = f" ({suite.commit[:12]})" if suite.commit else ""
    modified = ", modified" if suite.modified else ""
    return {**texts, "suite": f"{suite.version}{commit}{modified}"}


def natural(text: str) -> list[tuple[int, str]]:
    """Key that sorts numbers in texts by their value."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", text)]


def harmless(text: str, limit: int = _TEXT_LIMIT) -> str:
    """The text as plain text of bounded length."""
    if len(text) <= limit and text.isprintable():
        return text
    return plain(shortened(text, limit))


def page_key(text: str, identity: str) -> str:
    """Name of a page's file: legible, and the same in all sites; identities do not share one."""
    digest = hashlib.sha256(identity.encode(errors="replace")).hexdigest()
    return f"{safe(text[:60])}-{digest[:8]}"


def _environment(record: Record) -> Environment | None:
    keys = [test.environment for test in record.tests if test.environment is not None]
    if not keys:
        return next(iter(record.environments.values()), None)
    with_kernel = [key for key in keys if record.environments[key].kernel] or keys
    return record.environments[max(with_kernel, key=with_kernel.count)]


def _place(environment: Environment | None) -> Place:
    if environment is None:
        return ("", "", "", "", "", "", "")
    kernel = environment.kernel
    debug = environment.settings.get("kernel") == "debug"
    return (
        f"Linux {branch(kernel.release)}{' debug' * debug}" if kernel else "",
        f"QEMU {branch(environment.qemu.version)}",
        f"{kernel.page_size_bytes // 1024}K pages" if kernel and kernel.page_size_bytes else "",
        (kernel.mmu or "") if kernel else "",
        environment.cpu or "",
        environment.accel or "",
        f"{environment.smp} CPUs" if environment.smp else "",
    )


def branch(version: str) -> str:
    """The branch of a version: "6.12" of "6.12.117-paprscm", "7.3" of "7.3-rc2-00012-gabcdef"."""
    match = _BRANCH.fullmatch(release(version))
    return match[1] + match[2] if match else version


def release(version: str) -> str:
    """A version without the words of its distributor, and without the mark of our own kernels."""
    return version.partition(" ")[0].removesuffix("-paprscm")


def _key(record: Record) -> str:
    job = record.job
    text = f"{job.start[:16].replace(':', '.')}-{job.id[:7]}"
    return page_key(text, f"{job.id} {job.start}")


def _time(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    # A record has the zone; without one, two times could not be compared.
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _prepared(record: Record) -> Record:
    """The record without facts, its largest part, with its tests by name."""
    tests = [replace(test, facts={}) if test.facts else test for test in record.tests]
    tests.sort(key=lambda test: test.name)
    return closed(replace(record, tests=tuple(tests)), "the job was killed")


def _by_name(tests: Sequence[Test]) -> dict[str, Test]:
    found: dict[str, Test] = {}
    for test in tests:
        earlier = found.get(test.name)
        if earlier is None or rank(test.status) < rank(earlier.status):
            found[test.name] = test
    return found


def rank(status: Status) -> int:
    """Position in the order of statuses: 0 is the worst one."""
    return ORDER.index(status)
