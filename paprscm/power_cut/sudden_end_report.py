# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports of guest_tools/promise.c on a file system after a sudden end, parsed strictly."""

from __future__ import annotations

from typing import Final, Literal

from paprscm.guest.report import Fields, Natural, ToolReport, check_report

KINDS: Final = ("file", "size", "extent", "bytes", "strange")
"""Kinds of damage: a file is missing; a file is too short; a page has no extent; a page has other
bytes than were stored; the worst: data that no process stored ("strange")."""


class Damage(Fields, frozen=True, kw_only=True):
    """One damage.

    Attributes:
        kind: one of KINDS.
        file: number of the file in the plan.
        offset: offset in the file, bytes.
        expected, found: the eight bytes at the offset, or the sizes of the file.
    """

    kind: Literal["file", "size", "extent", "bytes", "strange"]
    file: Natural
    offset: Natural
    expected: Natural
    found: Natural

    def __str__(self) -> str:
        name = f"file f{self.file:06}"
        if self.kind == "file":
            return f"{name} is missing"
        if self.kind == "size":
            return f"{name} has {self.found} bytes of {self.expected}"
        if self.kind == "extent":
            return f"{name}, offset {self.offset:#x}: no extent"
        return f"{name}, offset {self.offset:#x}: {self.found:#x} for {self.expected:#x}"


class PromiseReport(ToolReport, frozen=True, kw_only=True):
    """Comparison of the file system with the completed steps.

    Attributes:
        seed, done: seed of the plan, and number of completed steps.
        page_size: page size of the guest, bytes.
        files, pages: number of files and pages that had to survive.
        intact: number of intact pages among them.
        lost: number of damages of each of KINDS.
        findings: the first damages.
    """

    tool: Literal["promise"]
    seed: Natural
    done: Natural
    page_size: Natural
    files: Natural
    pages: Natural
    intact: Natural
    lost: dict[str, Natural]
    findings: tuple[Damage, ...]

    def __post_init__(self) -> None:
        check_report(self.lost.keys() == set(KINDS), f"lost has the kinds {sorted(self.lost)}")
        total, listed = sum(self.lost.values()), len(self.findings)
        check_report(self.intact <= self.pages, "more intact pages than expected")
        check_report(self.files <= self.pages, "a file without a page")
        check_report(bool(total) or self.intact == self.pages, "pages are lost without a finding")
        check_report(bool(listed) == bool(total), f"{listed} findings of {total}")
        for kind, count in self.lost.items():
            listed_of_kind = sum(1 for damage in self.findings if damage.kind == kind)
            check_report(
                listed_of_kind <= count, f"{listed_of_kind} findings of kind {kind}, of {count}"
            )

    @property
    def exit_status(self) -> int:
        return int(not self.kept)

    @property
    def kept(self) -> bool:
        """All data that had to survive did, and no other data appeared."""
        return not any(self.lost.values())

    @property
    def strange(self) -> bool:
        """Data that no process stored appeared."""
        return bool(self.lost["strange"])

    @property
    def lossy(self) -> bool:
        """Data that had to survive are lost."""
        return any(count for kind, count in self.lost.items() if kind != "strange")

    def __str__(self) -> str:
        if self.kept:
            return f"all {self.pages} pages of {self.files} files are intact"
        counts = ", ".join(f"{kind} {count}" for kind, count in self.lost.items() if count)
        return (
            f"{self.pages - self.intact} of {self.pages} pages of {self.files} files are lost "
            f"({counts}): " + "; ".join(map(str, self.findings))
        )
