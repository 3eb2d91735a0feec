# SPDX-License-Identifier: GPL-2.0-or-later
"""Writer of the record of a running job: the document is replaced whenever a test starts or ends.

A job may be killed at any moment, so each version of the document is complete, and a rename
replaces the one before. Encoding and writing 300 tests takes 10 ms.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import msgspec

from paprscm.results.files import publish
from paprscm.results.record import FILE, Environment, Record, Test, closed, encode, lock


class Writer:
    """The record of one running job; no other process writes to it.

    Args:
        folder: the job's folder.
        record: job, host and suite.
        tests: the job's tests, PLANNED.

    Attributes:
        problem: the error of the last attempt to write; None: it succeeded. The disk may be full;
            the tests go on, and the last complete document stays.
    """

    def __init__(self, folder: Path, record: Record, tests: Iterable[Test]) -> None:
        self._file = folder / FILE
        self._record = record
        self._tests = {test.id: test for test in tests}
        self.problem: OSError | None = None
        self._lock = lock(folder)
        self._publish()

    def test(self, test_id: str) -> Test:
        """The current state of a test.

        Raises:
            KeyError: the job has no such test.
        """
        return self._tests[test_id]

    def update(self, test: Test, environment: Environment | None = None) -> None:
        """Store the new state of a test and the environment that it reported."""
        if environment is not None:
            digest = hashlib.sha256(msgspec.json.encode(environment)).hexdigest()[:16]
            self._record.environments.setdefault(digest, environment)
            test = replace(test, environment=digest)
        self._tests[test.id] = test
        self._publish()

    def close(self, *, end: str, status: int, interruption: str | None) -> Record:
        """Store the end of the job; tests that have not ended are INTERRUPTED.

        Args:
            end: ISO 8601 with zone.
            status: exit status of Avocado.
            interruption: the reason for an early end.
        """
        job = replace(self._record.job, end=end, status=status, interruption=interruption)
        current = replace(self._record, job=job, tests=tuple(self._tests.values()))
        self._record = closed(current, "the job was interrupted")
        self._tests = {test.id: test for test in self._record.tests}
        self._publish()
        os.close(self._lock)
        return self._record

    def _publish(self) -> None:
        self.problem = None
        try:
            publish(encode(replace(self._record, tests=tuple(self._tests.values()))), self._file)
        except OSError as error:
            self.problem = error
