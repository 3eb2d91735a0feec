# SPDX-License-Identifier: GPL-2.0-or-later
"""MAINTAINERS of Linux and QEMU: the addresses for a source file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_ENTRY = re.compile(r"^([A-Z]):\s+(.+)$")


@dataclass(frozen=True)
class Addresses:
    """Receivers of a report.

    Attributes:
        people: maintainers (M) and reviewers (R), "Name <address>".
        lists: mailing lists (L).
    """

    people: tuple[str, ...]
    lists: tuple[str, ...]


def addresses(text: str, files: Iterable[str]) -> Addresses:
    """Return the addresses of all sections that cover one of the files, each once.

    A section covers the paths of its F entries ("dir/" with all below it; "*" and "?" do not match
    "/") and those that match its N entries (regular expressions), without those of its X entries
    (Linux MAINTAINERS, "Descriptions of section entries"). A section for all files ("THE REST")
    counts only if no other one does.

    Args:
        text: the file MAINTAINERS.
        files: paths relative to the tree.
    """
    people: dict[str, None] = {}
    lists: dict[str, None] = {}
    wanted = list(files)
    covering = [s for s in _sections(text) if any(_covers(s, file) for file in wanted)]
    special = [s for s in covering if "*/" not in s.get("F", [])]
    for section in special or covering:
        people.update(dict.fromkeys([*section.get("M", []), *section.get("R", [])]))
        # "qemu-ppc@nongnu.org (moderated …)"
        lists.update((entry.split()[0], None) for entry in section.get("L", []))
    return Addresses(tuple(people), tuple(lists))


def _sections(text: str) -> Iterator[dict[str, list[str]]]:
    """Sections with their entries by letter; they are separated by empty lines."""
    for block in text.split("\n\n"):
        section: dict[str, list[str]] = {}
        for line in block.splitlines():
            if match := _ENTRY.match(line):
                section.setdefault(match[1], []).append(match[2].strip())
        if section:
            yield section


def _covers(section: dict[str, list[str]], file: str) -> bool:
    if any(_matches(pattern, file) for pattern in section.get("X", [])):
        return False
    if any(_matches(pattern, file) for pattern in section.get("F", [])):
        return True
    return any(re.search(pattern, file) for pattern in section.get("N", []))


def _matches(pattern: str, file: str) -> bool:
    """Match as scripts/get_maintainer.pl does."""
    expression = re.escape(pattern).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    if pattern.endswith("/"):
        return re.match(expression, file) is not None
    return re.fullmatch(expression, file) is not None
