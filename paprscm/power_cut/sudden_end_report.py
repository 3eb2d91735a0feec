# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports of guest_tools/promise.c on a file system after a sudden end, parsed strictly."""

from __future__ import annotations

from typing import Final, Literal

from paprscm.guest.report import Fields, Natural, ToolReport, check_report

KINDS: Final = ("file", "size", "extent", "bytes", "strange")
"""What can be wrong: a file is not there, is too short, a page has no extent, or not the bytes that
were stored; and the worst: there is what nobody stored."""


class Damage(Fields, frozen=True, kw_only=True):
    """One thing that is wrong.

    Attributes:
        kind: one of KINDS.
        file: its number in the plan.
        offset: where in the file, bytes.
        expected, found: the eight bytes there, or the sizes of the file.
    """

    kind: Literal["file", "size", "extent", "bytes", "strange"]
    file: Natural
    offset: Natural
    expected: Natural
    found: Natural

    def __str__(self) -> str:
        where = f"file f{self.file:06}"
        if self.kind == "file":
            return f"{where} is gone"
        if self.kind == "size":
            return f"{where} has {self.found} bytes of {self.expected}"
        if self.kind == "extent":
            return f"{where}, offset {self.offset:#x}: no extent"
        return f"{where}, offset {self.offset:#x}: {self.found:#x} for {self.expected:#x}"


class PromiseReport(ToolReport, frozen=True, kw_only=True):
    """Promised files and pages that were found.

    Attributes:
        seed, done: of the plan.
        page_size: of the guest, bytes.
        files, pages: that were promised.
        intact: the pages of them that are there.
        lost: how much is wrong of each of KINDS.
        findings: the first of it.
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
        total, shown = sum(self.lost.values()), len(self.findings)
        check_report(self.intact <= self.pages, "more pages intact than promised")
        check_report(self.files <= self.pages, "a file is promised without a page")
        check_report(bool(total) or self.intact == self.pages, "pages are lost without a finding")
        check_report(bool(shown) == bool(total), f"{shown} findings of {total}")
        for kind, count in self.lost.items():
            named = sum(1 for each in self.findings if each.kind == kind)
            check_report(named <= count, f"{named} findings of kind {kind}, of {count}")

    @property
    def exit_status(self) -> int:
        return int(not self.kept)

    @property
    def kept(self) -> bool:
        """All that was promised is there, and nothing strange."""
        return not any(self.lost.values())

    @property
    def strange(self) -> bool:
        """There is what nobody stored."""
        return bool(self.lost["strange"])

    @property
    def lossy(self) -> bool:
        """Something that was promised is lost."""
        return any(count for kind, count in self.lost.items() if kind != "strange")

    def __str__(self) -> str:
        if self.kept:
            return f"all {self.pages} pages of {self.files} files are there"
        counts = ", ".join(f"{kind} {count}" for kind, count in self.lost.items() if count)
        return (
            f"{self.pages - self.intact} of {self.pages} pages of {self.files} files are lost "
            f"({counts}): " + "; ".join(map(str, self.findings))
        )
