# SPDX-License-Identifier: GPL-2.0-or-later
"""What guest_tools/promise.c found in a file system after a sudden end, parsed strictly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from paprscm.guest.report import Fields, MalformedError, load_line, unbelievable

KINDS: Final = ("file", "size", "extent", "bytes", "strange")
"""What can be wrong: a file is not there, is too short, a page has no extent, or not the bytes that
were stored; and the worst: there is what nobody stored."""

_STATUS_FINE, _STATUS_LOST = 0, 1


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: one of KINDS.
        file: its number in the plan.
        offset: where in the file, bytes.
        expected, found: the eight bytes there, or the sizes of the file.
    """

    kind: str
    file: int
    offset: int
    expected: int
    found: int

    def __str__(self) -> str:
        where = f"file f{self.file:06}"
        if self.kind == "file":
            return f"{where} is gone"
        if self.kind == "size":
            return f"{where} has {self.found} bytes of {self.expected}"
        if self.kind == "extent":
            return f"{where}, offset {self.offset:#x}: no extent"
        return f"{where}, offset {self.offset:#x}: {self.found:#x} for {self.expected:#x}"


@dataclass(frozen=True, kw_only=True)
class PromiseReport:
    """What was there of all that was promised.

    Attributes:
        seed, done: of the plan.
        page_size: of the guest, bytes.
        files, pages: that were promised.
        intact: the pages of them that are there.
        lost: how much is wrong of each of KINDS.
        findings: the first of it.
    """

    seed: int
    done: int
    page_size: int
    files: int
    pages: int
    intact: int
    lost: dict[str, int]
    findings: tuple[Finding, ...]

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


def parse_promise(stdout: str, status: int, stderr: str = "") -> PromiseReport:
    """Parse a report of `promise verify`; nothing in it may be missing, unknown or contradictory.

    Args:
        stdout: what it printed, one line of JSON.
        status: its exit status.
        stderr: for the message.

    Raises:
        ProbeError: with what is wrong.
    """
    try:
        return _report(load_line(stdout), status)
    except MalformedError as error:
        raise unbelievable("promise", error, stdout, status, stderr) from error


def _report(fields: Fields, status: int) -> PromiseReport:
    fields.require(fields.take("tool", str) == "promise", "not promise's")
    fields.require(fields.take("version", int) == 1, "of another version")
    counts = Fields(fields.take("lost", dict), "lost")
    lost = {kind: counts.take(kind, int) for kind in KINDS}
    counts.done()
    report = PromiseReport(
        seed=fields.take("seed", int),
        done=fields.take("done", int),
        page_size=fields.take("page_size", int),
        files=fields.take("files", int),
        pages=fields.take("pages", int),
        intact=fields.take("intact", int),
        lost=lost,
        findings=tuple(_finding(each) for each in fields.take("findings", list)),
    )
    fields.done()
    total = sum(lost.values())
    fields.require(
        status == (_STATUS_LOST if total else _STATUS_FINE),
        f"{total} findings do not end with status {status}",
    )
    fields.require(report.intact <= report.pages, "more pages intact than promised")
    fields.require(report.files <= report.pages, "a file is promised without a page")
    fields.require(bool(total) or report.intact == report.pages, "pages are lost without a finding")
    fields.require(
        bool(report.findings) == bool(total) and len(report.findings) <= total,
        f"{len(report.findings)} findings of {total}",
    )
    for kind, count in lost.items():
        named = sum(1 for each in report.findings if each.kind == kind)
        fields.require(named <= count, f"{named} findings of kind {kind}, of {count}")
    return report


def _finding(raw: object) -> Finding:
    fields = Fields(raw, "finding")
    finding = Finding(
        kind=fields.take("kind", str),
        file=fields.take("file", int),
        offset=fields.take("offset", int),
        expected=_hex(fields, "expected"),
        found=_hex(fields, "found"),
    )
    fields.done()
    fields.require(finding.kind in KINDS, f"kind is {finding.kind!r}")
    return finding


def _hex(fields: Fields, key: str) -> int:
    text = fields.take(key, str)
    # C's %#x writes zero without the prefix.
    fields.require(bool(re.fullmatch(r"0|0x[0-9a-f]{1,16}", text)), f"{key} is {text!r}")
    return int(text, 16)
