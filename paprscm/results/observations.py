# SPDX-License-Identifier: GPL-2.0-or-later
"""Observations of a test, on their way from its process to the record.

Avocado transports one text per test, the whiteboard. This module is its only writer and its only
reader. A killed test process has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import msgspec

from paprscm.results.record import Environment, Finding, Metric


@dataclass(kw_only=True)
class Observations:
    """Observations of a test process; the fields are those of record.Test and record.Times."""

    environment: Environment | None = None
    metrics: list[Metric] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    known_issues: list[Finding] = field(default_factory=list)
    reason: str = ""
    hint: str = ""
    activities: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    cpu_s: float | None = None

    def as_json(self) -> str:
        """The text of the whiteboard.

        Raises:
            TypeError: a fact is not JSON.
        """
        data = msgspec.json.encode(harmless(msgspec.to_builtins(self)))
        return msgspec.json.format(data, indent=1).decode()


def read_whiteboard(text: str | None) -> Observations:
    """Read a whiteboard; one that is not the suite's, or that is damaged, contains nothing."""
    try:
        return msgspec.json.decode((text or "{}").encode(), type=Observations)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return Observations()


def harmless(value: Any) -> Any:
    """A JSON value without lone surrogates, NaN and infinities, which JSON cannot represent."""
    match value:
        case str():
            return value.encode(errors="replace").decode()
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            return {harmless(str(name)): harmless(part) for name, part in value.items()}
        case list() | tuple():
            return [harmless(part) for part in value]
    return value
