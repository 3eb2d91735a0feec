# SPDX-License-Identifier: GPL-2.0-or-later
"""Texts from guests and tests, made harmless for terminals, XML and dashboards."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

from paprscm.results.record import Test

EXCERPT_LINES: Final = 20
_EXCERPT_BYTES = 16_384
_LINE_LIMIT = 400
# ECMA-48: CSI and OSC sequences, and other escapes of two bytes.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
# Control characters but tab and newline, the line separators of Unicode, overrides of the writing
# direction, surrogates, and the two noncharacters that XML forbids.
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069"
    "\ud800-\udfff\ufffe\uffff]"
)


def plain(text: str) -> str:
    """The text without escape sequences; U+FFFD replaces other characters that may do harm.

    It is valid in XML, and cannot change the state of a terminal or the order of what is read.
    """
    # Most texts are; all that is replaced is not printable.
    if text.isprintable():
        return text
    return _HARMFUL.sub("\N{REPLACEMENT CHARACTER}", _ESCAPES.sub("", text.replace("\r\n", "\n")))


def one_line(text: str) -> str:
    """The text as one line of plain text."""
    return " ".join(plain(text).split())


def first_line(text: str) -> str:
    """The first line that is not empty, as plain text."""
    return next((one_line(line) for line in text.splitlines() if line.strip()), "")


def shortened(text: str, limit: int) -> str:
    """The text, cut to `limit` characters with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def unique(name: str, limit: int) -> str:
    """A name of at most `limit` characters: a long one ends with a digest of all of it."""
    if len(name) <= limit:
        return name
    return f"{name[: limit - 13]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def last_lines(file: Path, count: int = EXCERPT_LINES) -> list[str]:
    """The last lines of a log as plain text, each of bounded length; empty without the file."""
    try:
        with file.open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - _EXCERPT_BYTES))
            text = log.read().decode(errors="replace")
    except OSError:
        return []
    lines = [shortened(line.rstrip(), _LINE_LIMIT) for line in plain(text).splitlines()]
    return [line for line in lines if line][-count:]


def explanation(test: Test) -> str:
    """Reason and hint of a test, as plain text."""
    return plain(f"{test.reason}\nhint: {test.hint}" if test.hint else test.reason)
