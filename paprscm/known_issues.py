# SPDX-License-Identifier: GPL-2.0-or-later
"""Known issues: one file each, with the versions that introduced and fixed the bug."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from paprscm.errors import ConfigError, HostError
from paprscm.paths import KNOWN_ISSUES

PRODUCTS = ("QEMU", "Linux", "Avocado")
"""Products with files of known issues."""

FOLDER = KNOWN_ISSUES

_RELEASE = 1000
_LAST_MINOR = {"Linux": 19, "QEMU": 2}
_HINT = "see known_issues/README.md for the format"
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


@dataclass(frozen=True)
class KnownIssue:
    """A bug of a product under test.

    Attributes:
        name: its file's name without the suffix.
        title: its first line.
        product: one of PRODUCTS.
        since: versions that introduced it.
        fixed_in: versions that fixed it; empty if no fix is known.
    """

    name: str
    title: str
    product: str
    since: tuple[VersionNumber, ...]
    fixed_in: tuple[VersionNumber, ...]

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


def read_issue(name: str, *, folder: Path = FOLDER) -> KnownIssue:
    """Read the file of one known issue.

    Args:
        name: the file's name without ".md".

    Raises:
        ConfigError: the file does not exist, or its lines "- **Since:** Linux 5.3" and
            "- **Fixed in:** 6.12.112, 7.1" (or "none") cannot be parsed.
    """
    file = folder / f"{name}.md"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"known issue {file}: {error.strerror}") from error
    product, _, brought = _line(file, text, "Since").partition(" ")
    if product not in PRODUCTS:
        raise ConfigError(f"{file}: 'Since' names none of {', '.join(PRODUCTS)}", hint=_HINT)
    fixed = _line(file, text, "Fixed in")
    since = _numbers(file, brought)
    fixed_in = () if fixed == "none" else _numbers(file, fixed)
    for number in fixed_in:
        if not reached(since, number) or number in since:
            raise ConfigError(f"{file}: fixed in {number}, which does not come after 'Since'")
    title = text.splitlines()[0].removeprefix("# ")
    return KnownIssue(name, title, product, since, fixed_in)


def _line(file: Path, text: str, name: str) -> str:
    lines = re.findall(rf"^- \*\*{name}:\*\* (.+)$", text, re.MULTILINE)
    if len(lines) != 1:
        raise ConfigError(f"{file} has {len(lines)} lines '- **{name}:** …', not one", hint=_HINT)
    return str(lines[0])


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
