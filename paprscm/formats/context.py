# SPDX-License-Identifier: GPL-2.0-or-later
"""Facts for a format that the record does not have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from paprscm.errors import ConfigError
from paprscm.results.record import BROKEN, Record
from paprscm.results.text import last_lines
from paprscm.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Context:
    """Facts of a job that are not in its record, for reports.

    Attributes:
        excerpts: the console's last lines, as plain text, of each test that broke, by its id.
        origin: name of the CI system, for KCIDB: lower case, digits, "_".
        build: id of a build that another origin has reported to KCIDB ("maestro:…"), or "".
        logs_url: address at which the job's folder can be read, ending with "/", or "".
    """

    excerpts: Mapping[str, str] = field(default_factory=dict)
    origin: str = "paprscm"
    build: str = ""
    logs_url: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch("[a-z0-9_]+", self.origin):
            raise ConfigError(
                f"origin={self.origin} is not a name for KCIDB",
                hint="lower-case letters, digits and '_'",
            )
        if self.build and not re.fullmatch("[a-z0-9_]+:[^\0]+", self.build):
            raise ConfigError(
                f"build={self.build} is not the id of a build", hint="such as maestro:6745f…"
            )
        if self.logs_url and not re.fullmatch(r"https?://\S+/", self.logs_url):
            raise ConfigError(f"logs_url={self.logs_url} is not an http address that ends with /")


def read_context(record: Record, folder: Path, chosen: Settings, build: str = "") -> Context:
    """Read the excerpts, and the settings of reports.

    Args:
        record: of the job.
        folder: the job's folder.
        chosen: settings.
        build: as in Context.

    Raises:
        ConfigError: a setting does not fit.
    """
    tests = [test for test in record.tests if test.status in BROKEN and test.console]
    lines = {test.id: last_lines(folder / str(test.console)) for test in tests}
    excerpts = {test_id: "\n".join(text) for test_id, text in lines.items() if text}
    return Context(excerpts=excerpts, origin=chosen.origin, build=build, logs_url=chosen.logs_url)
