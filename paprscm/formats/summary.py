# SPDX-License-Identifier: GPL-2.0-or-later
"""Summary in Markdown, for the pages of CI systems ($GITHUB_STEP_SUMMARY)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from paprscm.formats.context import Context
from paprscm.results import labels, tally
from paprscm.results.record import BROKEN, Record, Test
from paprscm.results.text import explanation, one_line, plain, shortened

_BROKEN_LIMIT: Final = 30
"""GitHub refuses a summary of more than 1 MiB."""
_TEXT_LIMIT: Final = 4000


def render(record: Record, context: Context) -> str:
    """Counts by subject, each test that broke, known issues, and the environments."""
    return "\n".join(_lines(record, context)) + "\n"


def _lines(record: Record, context: Context) -> Iterator[str]:
    counts = tally.statuses(record)
    words = [f"{counts[status]} {status}" for status in tally.ORDER if counts[status]]
    yield f"## paprscm: {', '.join(words) or 'no test'}\n"
    if record.job.interruption:
        yield f"Interrupted: {_escaped(record.job.interruption)}\n"
    if record.job.end is None:
        yield "The job was killed.\n"
    columns = [status for status in tally.ORDER if counts[status]]
    yield f"| subject | {' | '.join(columns)} | time |"
    yield f"|---|{'---:|' * (len(columns) + 1)}"
    for name, subject in tally.subjects(record).items():
        cells = [str(subject.statuses[status] or "") for status in columns]
        yield f"| {_escaped(name)} | {' | '.join(cells)} | {tally.seconds(subject.duration_s)} |"
    yield ""
    broken = [test for test in record.tests if test.status in BROKEN]
    for test in broken[:_BROKEN_LIMIT]:
        yield from _broken(test, context.excerpts.get(test.id, ""))
    if len(broken) > _BROKEN_LIMIT:
        yield f"… and {len(broken) - _BROKEN_LIMIT} more.\n"
    if issues := tally.issues(record):
        yield "### Known issues\n"
        yield "| issue | tests | on | |"
        yield "|---|---:|---|---|"
        for name, issue in issues.items():
            versions = ", ".join(sorted(issue.versions))
            cells = [name, str(issue.tests), versions, issue.title]
            yield f"| {' | '.join(map(_escaped, cells))} |"
        yield ""
    for environment in record.environments.values():
        yield f"- {_escaped(labels.title(environment))}"


def _broken(test: Test, excerpt: str) -> Iterator[str]:
    yield f"### {test.status}: {_escaped(test.name)}\n"
    if test.contract:
        yield f"{_escaped(test.contract)}\n"
    text = explanation(test) + (f"\n\n{plain(excerpt)}" if excerpt else "")
    text = shortened(text, _TEXT_LIMIT)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield f"{fence}text\n{text}\n{fence}\n"
    yield f"Run it again: <code>{_escaped(test.command)}</code>\n"


def _escaped(text: str) -> str:
    """One line without Markdown or HTML."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~!#])", r"\\\1", line)
