# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm matrix run`: cells that fail to build, are interrupted or killed, and go on later."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from records import make_record, make_test

from paprscm.commands import cli
from paprscm.host import process
from paprscm.host.process import Completed
from paprscm.matrix.outcome import CELLS, DONE
from paprscm.results.record import FILE, Record, encode

PLAN = """
[axes.smp]
one = { smp = 1 }
two = { smp = 2 }
"""
END = "2026-11-27T02:50:00.000+01:00"


class Jobs:
    """The commands of the cells: `paprscm image`, and `paprscm run`, which leaves a record.

    Attributes:
        unbuildable: the words of a setting that `image` refuses.
        records: what the next jobs leave; the last one is left again and again.
        ran: the settings of the cells whose tests ran.
    """

    def __init__(self, *records: Record, unbuildable: str = "") -> None:
        self.records = list(records)
        self.unbuildable = unbuildable
        self.ran: list[str] = []

    def run(self, argv: Sequence[str | Path], **_: Any) -> Completed:
        words = [str(word) for word in argv]
        cell = next(word for word in words if word.startswith("--smp="))
        if "image" in words:
            refused = cell == self.unbuildable
            lines = ("paprscm: no such kernel",) if refused else ()
            return Completed(lines=lines, duration_s=1.0, status=2 * refused)
        record = self.records.pop(0) if len(self.records) > 1 else self.records[0]
        results = words[words.index("--job-results-dir") + 1]
        (Path(tempfile.mkdtemp(prefix="job-", dir=results)) / FILE).write_bytes(encode(record))
        self.ran.append(cell)
        return Completed(lines=(), duration_s=1.0, status=record.job.status or 0)


def ended(*statuses: str, status: int = 0, interruption: str | None = None) -> Record:
    """The record of a job that has ended."""
    record = make_record(*(make_test(f"t.py:T.test_{s}", status=s) for s in statuses))
    job = replace(record.job, end=END, status=status, interruption=interruption)
    return replace(record, job=job)


@pytest.fixture
def matrix_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs the plan's two cells with the given jobs; it returns the status."""
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN)

    def run(jobs: Jobs, *words: str) -> int:
        monkeypatch.setattr(process, "run", jobs.run)
        folder = ["--output", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache")]
        return cli.main(["matrix", "run", str(plan), *folder, *words])

    return run


def done(tmp_path: Path) -> list[str]:
    return sorted(path.parent.name for path in (tmp_path / "out" / CELLS).glob(f"*/{DONE}"))


def test_a_cell_that_cannot_be_built_stops_no_other_one(
    matrix_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = Jobs(ended("PASS"), unbuildable="--smp=1")
    assert matrix_run(jobs) == 1
    assert jobs.ran == ["--smp=2"]
    assert done(tmp_path) == ["one", "two"]
    assert "no such kernel" in capsys.readouterr().out
    # --resume tries it again, and only it.
    jobs = Jobs(ended("PASS"))
    assert matrix_run(jobs, "--resume") == 0
    assert jobs.ran == ["--smp=1"]


def test_a_test_that_took_too_long_does_not_end_the_matrix(matrix_run: Any, tmp_path: Path) -> None:
    jobs = Jobs(ended("PASS", "INTERRUPTED", status=9), ended("PASS"))
    assert matrix_run(jobs) == 1
    assert jobs.ran == ["--smp=1", "--smp=2"]
    assert done(tmp_path) == ["one", "two"]


def test_an_interrupted_job_ends_the_matrix(matrix_run: Any, tmp_path: Path) -> None:
    jobs = Jobs(ended("PASS", "INTERRUPTED", status=8, interruption="by the user"), ended("PASS"))
    assert matrix_run(jobs) == 130
    assert jobs.ran == ["--smp=1"]
    assert done(tmp_path) == []
    # The cell is not done: --resume runs it, and the other one.
    jobs = Jobs(ended("PASS"))
    assert matrix_run(jobs, "--resume") == 0
    assert jobs.ran == ["--smp=1", "--smp=2"]


def test_a_killed_job_stops_no_other_cell_and_is_run_again(
    matrix_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = ended("PASS", "RUNNING")
    killed = replace(killed, job=replace(killed.job, end=None, status=None))
    jobs = Jobs(killed, ended("PASS"))
    assert matrix_run(jobs) == 1
    assert jobs.ran == ["--smp=1", "--smp=2"]
    assert done(tmp_path) == ["two"]
    assert "(1/2) one: its job was killed" in capsys.readouterr().out
    jobs = Jobs(ended("PASS"))
    assert matrix_run(jobs, "--resume") == 0
    assert jobs.ran == ["--smp=1"]
