# SPDX-License-Identifier: GPL-2.0-or-later
"""The formats of a job's results by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from paprscm.errors import ConfigError
from paprscm.formats import junit, kcidb, ktap, lava, squad, summary
from paprscm.formats.context import Context
from paprscm.results.record import Record, encode


def _json(record: Record, _context: Context) -> str:
    return encode(record).decode()


FORMATS: Final[Mapping[str, Callable[[Record, Context], str]]] = {
    "json": _json,
    "junit": junit.render,
    "kcidb": kcidb.render,
    "ktap": ktap.render,
    "lava": lava.render,
    "markdown": summary.render,
    "squad": squad.render,
}
FILES: Final[Mapping[str, str]] = {
    "json": "paprscm.json",
    "junit": "paprscm-junit.xml",
    "kcidb": "paprscm-kcidb.json",
    "ktap": "paprscm.ktap",
    "lava": "paprscm-lava.txt",
    "markdown": "paprscm-summary.md",
    "squad": "paprscm-squad.json",
}
"""Names of the files that are written at the end of a job."""


def parse_names(text: str) -> tuple[str, ...]:
    """The formats of a list such as "junit,ktap".

    Raises:
        ConfigError: a format is unknown.
    """
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"unknown format '{name}'", hint=f"one of {', '.join(FORMATS)}")
    return names
