# SPDX-License-Identifier: GPL-2.0-or-later
"""Known issues: one file each, which says in which versions of QEMU or Linux the bug is there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from paprscm.errors import ConfigError, HostError

PRODUCTS = ("QEMU", "Linux")
"""Those whose versions a file can list."""

FOLDER = Path(__file__).resolve().parent.parent / "known_issues"

_LINE = re.compile(
    rf"^- \*\*Versions:\*\* (?P<product>{'|'.join(PRODUCTS)}) (?P<ranges>.+)$", re.MULTILINE
)
_RANGE = re.compile(r"(\d+)\.(\d+)(?: to (\d+)\.(\d+))?")


@dataclass(frozen=True)
class KnownIssue:
    """A bug that somebody else has to mend.

    Attributes:
        name: its file's name without the suffix.
        title: its first line.
        product: whose bug it is, and whose versions are listed: "QEMU" or "Linux".
        ranges: first and last version that has it, both included, as (major, minor).
    """

    name: str
    title: str
    product: str
    ranges: tuple[tuple[tuple[int, int], tuple[int, int]], ...]

    def lists(self, version: str) -> bool:
        """Whether this version of the product is known to have it.

        Args:
            version: as "10.0.13" or, of a kernel's release, "6.12.107-paprscm".

        Raises:
            HostError: it does not begin with two numbers.
        """
        found = re.match(r"(\d+)\.(\d+)", version)
        if found is None:
            raise HostError(f"{version!r} is no version of {self.product}")
        number = int(found[1]), int(found[2])
        return any(first <= number <= last for first, last in self.ranges)


def load(name: str, *, folder: Path = FOLDER) -> KnownIssue:
    """Read the file of one known issue.

    Args:
        name: the file's name without ".md".

    Raises:
        ConfigError: there is no such file, or it names no versions, as in
            "- **Versions:** QEMU 7.0 to 7.2, 10.0 to 11.1" or "- **Versions:** Linux 5.13 to 6.12".
    """
    file = folder / f"{name}.md"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"known issue {file}: {error.strerror}") from error
    line = _LINE.search(text)
    if line is None:
        raise ConfigError(
            f"{file} names no versions", hint="a line such as - **Versions:** QEMU 7.0 to 11.1"
        )
    ranges = []
    for word in line["ranges"].split(","):
        found = _RANGE.fullmatch(word.strip())
        if found is None:
            raise ConfigError(f"{file}: '{word.strip()}' is no range of versions")
        first = (int(found[1]), int(found[2]))
        ranges.append((first, (int(found[3]), int(found[4])) if found[3] else first))
    title = text.splitlines()[0].removeprefix("# ")
    return KnownIssue(name, title, line["product"], tuple(ranges))
