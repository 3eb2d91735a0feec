# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports that wait to be sent, in a folder that survives a crash.

A report is a file NAME.pending until its receiver has accepted it; NAME.sent, which has the
receiver's answer, keeps it from being sent again, and NAME.refused from being tried again. The name
is a digest of the content. If a process ends between the acceptance and the change of the name, the
report is sent twice: both receivers recognize it by its ids.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from paprscm.results.files import publish


@dataclass(frozen=True, kw_only=True)
class Report:
    """A request that delivers results.

    Attributes:
        receiver: "kcidb" or "squad".
        url: address of the receiver, without a token.
        path: relative to the address.
        content_type: of the body.
        body: text.
    """

    receiver: str
    url: str
    path: str
    content_type: str
    body: str

    @property
    def name(self) -> str:
        """Name in the spool."""
        content = json.dumps(asdict(self), sort_keys=True).encode()
        return f"{self.receiver}-{hashlib.sha256(content).hexdigest()[:24]}"


class Spool:
    """A folder of reports.

    Args:
        folder: made if it is missing; readable for this user only.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder

    def add(self, report: Report) -> str | None:
        """Store a report.

        Returns:
            The receiver's answer if the same report was sent before; None: it waits.
        """
        with contextlib.suppress(FileNotFoundError):
            return self._file(report, "sent").read_text()
        pending = self._file(report, "pending")
        if not pending.exists():
            publish(json.dumps(asdict(report)).encode(), pending, durable=True)
        self._file(report, "refused").unlink(missing_ok=True)
        return None

    @contextlib.contextmanager
    def sending(self, receiver: str, url: str) -> Iterator[list[Report]]:
        """The reports that wait for a receiver, the oldest first; other processes wait."""
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = sorted(
                self._folder.glob(f"{receiver}-*.pending"), key=lambda file: file.stat().st_mtime_ns
            )
            reports = [Report(**json.loads(file.read_text())) for file in files]
            yield [report for report in reports if report.url == url]

    def mark(self, report: Report, state: str, answer: str) -> None:
        """Store the answer of the receiver: `state` is "sent" or "refused"."""
        publish(answer.encode(), self._file(report, state), durable=True)
        self._file(report, "pending").unlink(missing_ok=True)

    def _file(self, report: Report, state: str) -> Path:
        return self._folder / f"{report.name}.{state}"
