# SPDX-License-Identifier: GPL-2.0-or-later
"""Known issues: one file each, with versions, severity, tests, and a reproduction."""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from paprscm.errors import ConfigError, HostError
from paprscm.paths import KNOWN_ISSUES

PRODUCTS = ("QEMU", "Linux", "Avocado")
"""Products with files of known issues."""

FOLDER = KNOWN_ISSUES

SEVERITIES = {
    "silent data loss": "data are lost, damaged or not durable, and nothing reports it",
    "harm to the host": "a guest uses resources of its host without limit",
    "loss of service": "a crash or a hang; a machine or a DIMM that is unusable",
    "wrong result": "a wrong value, state or message, or a missing report",
    "slow": "the right result, too late",
}
"""Severities, the worst one first, with their meanings."""

TRIGGERS = {
    "guest kernel": "code in the guest that makes hypervisor calls",
    "guest root": "root in the guest",
    "guest user": "a program in the guest that may use the disk, the file or the DAX device",
    "host user": "the user of QEMU's command line or monitor",
    "host failure": "an I/O error, a full or a slow disk of the host",
    "migration": "a migration or a snapshot that is restored",
    "test runner": "a run of Avocado",
}
"""Triggers of an issue, with their meanings."""

SCRIPTS = ("host.sh", "guest.sh")
"""Reproductions in the folder of an issue: on the host, or in a guest."""

SHARED = ("lib.sh", "bare.h")
"""Files in the folder of known issues that several reproductions use."""

_RELEASE = 1000
_LAST_MINOR = {"Linux": 19, "QEMU": 2}
_HINT = "see known_issues/README.md for the format"
_FIELD = re.compile(r"^- \*\*([A-Z][a-z ]+):\*\* (.+(?:\n  .+)*)$", re.MULTILINE)
_TEST = re.compile(r"`((?:tests|selftests)/\S+\.py:\S+)`")
_SOURCE = re.compile(r"`([\w./-]+\.(?:c|h|S|py))(?::\w+)?`")
_SETTING = re.compile(r"[a-z_]+=\S+")
_LISTED = re.compile(r"(\d+)\.(\d+)(?:\.([1-9]\d*)|-rc(\d+))?")
_VERSION = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:-rc(\d+))?(.*)")
_DEVELOPMENT = re.compile(r"(-g[0-9a-f]{6,}|\+|-dirty)$")
_DISTRIBUTION = re.compile(r"\+deb|[-.]\d")


class VersionNumber(NamedTuple):
    """Version of a product; within one branch, numbers compare in chronological order."""

    major: int
    minor: int
    patch: int = 0
    rc: int = _RELEASE
    """N of -rcN; a release comes after all of its candidates."""

    def __str__(self) -> str:
        patch = f".{self.patch}" if self.patch else ""
        return f"{self.major}.{self.minor}{patch}" + (f"-rc{self.rc}" * (self.rc < _RELEASE))


class IssueState(enum.Enum):
    """State of a known issue in one version, according to its file."""

    BEFORE = "before 'Since'"
    PRESENT = "has it"
    UNCERTAIN = "may have the fix"
    FIXED = "fixed"


@dataclass(frozen=True, kw_only=True)
class KnownIssue:
    """A bug of a product under test.

    Attributes:
        name: its file's name without the suffix.
        title: its first line.
        location: source files, and functions or structures in them, as Markdown.
        severity: one of SEVERITIES.
        trigger: one of TRIGGERS.
        product: one of PRODUCTS.
        since: versions that introduced it.
        fixed_in: versions that fixed it; empty if no fix is known.
        seen_in: versions in which it was seen, in words.
        reported: where it was reported, in words.
        shown_by: tests that show it, "tests/FOLDER/FILE.py:Class.test"; or words, if no test does.
        machine: the DIMMs of a guest that shows it, each as for `paprscm shell --nvdimm`.
        settings: settings of the suite that its reproduction needs, by name.
        text: the description: all that follows the fields.
        folder: the folder of its reproduction and its fix, which may not exist.
    """

    name: str
    title: str
    location: str
    severity: str
    trigger: str
    product: str
    since: tuple[VersionNumber, ...]
    fixed_in: tuple[VersionNumber, ...]
    seen_in: str
    reported: str
    shown_by: str
    machine: tuple[str, ...]
    settings: Mapping[str, str]
    text: str
    folder: Path

    @property
    def script(self) -> Path | None:
        """Its reproduction, host.sh or guest.sh; None if only a test shows it."""
        return next(filter(Path.is_file, (self.folder / name for name in SCRIPTS)), None)

    @property
    def patch(self) -> Path | None:
        """The fix, for the newest version of the product; None if there is none."""
        file = self.folder / "fix.patch"
        return file if file.is_file() else None

    @property
    def attachments(self) -> list[Path]:
        """Files of the reproduction; empty if the issue has none of its own."""
        if not self.folder.is_dir():
            return []
        own = sorted(file for file in self.folder.iterdir() if file.suffix != ".patch")
        texts = [file.read_text() for file in own]
        shared = [name for name in SHARED if any(f"../{name}" in text for text in texts)]
        return [*(self.folder.parent / name for name in shared), *own]

    @property
    def tests(self) -> list[str]:
        """Tests that show the issue: "tests/FOLDER/FILE.py:Class.test"."""
        return _TEST.findall(self.shown_by)

    @property
    def files(self) -> list[str]:
        """Source files of the product that have the bug, relative to its tree."""
        return _SOURCE.findall(self.location)

    def section(self, heading: str) -> str:
        """Text of a section of the description, without its heading; empty if it is missing."""
        parts = re.split(r"^## (.+)\n", self.text, flags=re.MULTILINE)
        return dict(zip(parts[1::2], parts[2::2], strict=True)).get(heading, "").strip("\n")

    @property
    def description(self) -> str:
        """The text before the first section."""
        return self.text.partition("\n## ")[0].strip()

    def update(self, version: str, *, shows: bool) -> str | None:
        """Request to update the issue's file after an observation; None if it agrees.

        Args:
            version: as in bounds().
            shows: the version has the bug.

        Raises:
            HostError: as state().
        """
        state = self.state(version)
        product, file = f"{self.product} {version}", f"known_issues/{self.name}.md"
        if shows and state is IssueState.BEFORE:
            return f"known issue {self.name} shows on {product}: update 'Since' of {file}"
        if not shows and state is IssueState.PRESENT:
            return (
                f"known issue {self.name} no longer shows on {product}: if it is fixed there, "
                f"update 'Fixed in' of {file}"
            )
        return None

    def state(self, version: str) -> IssueState:
        """State of the bug in a version of the product.

        Args:
            version: as in bounds().

        Raises:
            HostError: it is not a version.
        """
        first, last = bounds(self.product, version)
        if reached(self.fixed_in, first):
            return IssueState.FIXED
        if last is None or reached(self.fixed_in, last):
            return IssueState.UNCERTAIN
        return IssueState.PRESENT if reached(self.since, last) else IssueState.BEFORE


def reached(listed: Iterable[VersionNumber], version: VersionNumber) -> bool:
    """Return True if a version contains a change that went into the listed versions.

    A stable release (6.12.113) counts for its own branch, a mainline release (7.0) for every later
    version: 6.13.9 contains neither, although it is greater than 6.12.113.
    """
    return any(
        version >= number and (not number.patch or version[:2] == number[:2]) for number in listed
    )


def bounds(product: str, version: str) -> tuple[VersionNumber, VersionNumber | None]:
    """Bounds of a version: it contains every change up to the first, none after the second.

    Both are equal for a release ("7.2.13", "6.12.117-paprscm", "10.0.13 (Debian …)"). A
    development version ("7.3-rc2+", "6.12.0-00123-gabcdef", QEMU's "11.1.50" and "11.1.92") is
    bounded by the release that follows it. A distribution's kernel ("6.12.117+deb13-powerpc64le",
    "5.14.0-503.el9.ppc64le") may contain any later fix: there is no second bound.

    Args:
        product: one of PRODUCTS.
        version: the kernel's release or QEMU's version, with or without a suffix.

    Raises:
        HostError: the version does not begin with two numbers.
    """
    match = _VERSION.match(version)
    if match is None:
        raise HostError(f"{version!r} is not a version of {product}")
    major, minor, patch = int(match[1]), int(match[2]), int(match[3] or 0)
    suffix = match[5]
    mainline = VersionNumber(major, minor)
    following = (
        VersionNumber(major + 1, 0)
        if minor >= _LAST_MINOR.get(product, minor + 1)
        else VersionNumber(major, minor + 1)
    )
    if product == "QEMU" and patch >= 50:
        # VERSION in QEMU's tree: x.y.50 after the release of x.y; x.y.9N is -rcN of the next one.
        return (following._replace(rc=patch - 90) if patch >= 90 else mainline), following
    release = VersionNumber(major, minor, patch)
    if match[4]:
        last = following if "-next-" in suffix else release
        return release._replace(rc=int(match[4])), last
    if _DEVELOPMENT.search(suffix):
        return release, release._replace(patch=patch + 1) if patch else following
    if product == "Linux" and _DISTRIBUTION.match(suffix):
        return release, None
    return release, release


def names(*, folder: Path = FOLDER) -> list[str]:
    """Names of all known issues."""
    return sorted(file.stem for file in folder.glob("*-*.md"))


def read_issue(name: str, *, folder: Path = FOLDER) -> KnownIssue:
    """Read the file of one known issue.

    Args:
        name: the file's name without ".md".

    Raises:
        ConfigError: the file does not exist, or its fields are not those of README.md.
    """
    file = folder / f"{name}.md"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        close = difflib.get_close_matches(name, names(folder=folder), 1)
        raise ConfigError(
            f"known issue {file}: {error.strerror}", hint=f"{close[0]}?" if close else None
        ) from error
    heading, _, rest = text.partition("\n\n")
    head, _, body = rest.partition("\n\n")
    fields = _Fields(file, head)
    product, _, brought = fields.take("Since").partition(" ")
    if product not in PRODUCTS:
        raise ConfigError(f"{file}: 'Since' names none of {', '.join(PRODUCTS)}", hint=_HINT)
    fixed = fields.take("Fixed in")
    since = _numbers(file, brought)
    fixed_in = () if fixed == "none" else _numbers(file, fixed)
    for number in fixed_in:
        if not reached(since, number) or number in since:
            raise ConfigError(f"{file}: fixed in {number}, which does not come after 'Since'")
    issue = KnownIssue(
        name=name,
        title=heading.removeprefix("# "),
        location=fields.take("Location").removeprefix(f"{product} "),
        severity=fields.take("Severity", SEVERITIES),
        trigger=fields.take("Triggered by", TRIGGERS),
        product=product,
        since=since,
        fixed_in=fixed_in,
        seen_in=fields.take("Seen in"),
        reported=fields.take("Reported"),
        shown_by=fields.take("Shown by"),
        machine=tuple(re.findall(r"`([^`]+)`", fields.take("Machine", optional=True))),
        settings=_settings(file, fields.take("Settings", optional=True)),
        text=body,
        folder=folder / name,
    )
    fields.expect_empty()
    return issue


class _Fields:
    """The list of fields below a title, "- **Name:** value"; a line may continue, indented."""

    def __init__(self, file: Path, head: str) -> None:
        self._file = file
        if _FIELD.sub("", head).strip():
            raise ConfigError(f"{file} has text between its fields", hint=_HINT)
        self._values: dict[str, str] = {}
        for name, value in _FIELD.findall(head):
            if name in self._values:
                raise ConfigError(f"{file} has the field '{name}' twice", hint=_HINT)
            self._values[name] = " ".join(value.split())

    def take(self, name: str, allowed: Iterable[str] = (), *, optional: bool = False) -> str:
        """Remove a field and return its value, one of `allowed` if any are given."""
        value = self._values.pop(name, None)
        if value is None:
            if optional:
                return ""
            raise ConfigError(f"{self._file} has no field '- **{name}:** …'", hint=_HINT)
        if allowed and value not in allowed:
            raise ConfigError(
                f"{self._file}: {name} is '{value}', not one of {', '.join(allowed)}", hint=_HINT
            )
        return value

    def expect_empty(self) -> None:
        """Raise ConfigError for fields that were not taken, such as a misspelled one."""
        if self._values:
            raise ConfigError(
                f"{self._file} has unknown fields: {', '.join(self._values)}", hint=_HINT
            )


def _settings(file: Path, text: str) -> dict[str, str]:
    """Parse "`kernel=debug`, `page_size=4k`"."""
    words = re.findall(r"`([^`]+)`", text)
    for word in words:
        if not _SETTING.fullmatch(word):
            raise ConfigError(f"{file}: setting '{word}' is not NAME=VALUE", hint=_HINT)
    return dict(word.split("=", 1) for word in words)


def _numbers(file: Path, text: str) -> tuple[VersionNumber, ...]:
    """Parse a list of versions, each for a branch of its own."""
    numbers: list[VersionNumber] = []
    for word in text.split(", "):
        match = _LISTED.fullmatch(word)
        if match is None:
            raise ConfigError(
                f"{file}: '{word}' is not a version such as 7.0 or 6.12.113", hint=_HINT
            )
        number = VersionNumber(
            int(match[1]), int(match[2]), int(match[3] or 0), int(match[4] or _RELEASE)
        )
        for other in numbers:
            if (
                reached([other], number)
                or reached([number], other)
                or not (number.patch or other.patch)
            ):
                raise ConfigError(
                    f"{file}: {other} and {number} count for the same branch", hint=_HINT
                )
        numbers.append(number)
    return tuple(numbers)
