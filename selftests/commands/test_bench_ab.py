# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm bench ab` with an Avocado that writes records without running tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from records import make_record, make_test

from paprscm.commands import bench_ab, cli
from paprscm.errors import HostError
from paprscm.results.record import FILE, Metric, encode

Jobs = list[tuple[str, dict[str, str], list[str]]]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Jobs:
    """Side, settings and other words of each job that was run; B is 50 % slower."""
    seen: Jobs = []

    def run(argv: Sequence[str], log_file: Path) -> None:
        words = list(argv)
        values = [words[i + 1] for i, word in enumerate(words) if word == "-p"]
        others = [w for i, w in enumerate(words[1:]) if w != "-p" and words[i] != "-p"]
        folder = Path(words[words.index("--job-results-dir") + 1])
        seen.append((folder.name, dict(value.split("=", 1) for value in values), others))
        log_file.write_text("started\nNO DISK\n")
        number = len(seen)
        metric = Metric(
            name="fsync", value=(1 + number / 1000) * 1.5 ** (folder.name == "b"), unit="s"
        )
        record = make_record(make_test("a", metrics=(metric,)))
        job = folder / f"job-{number}"
        job.mkdir()
        start = f"2026-11-27T00:{number:02}:00+00:00"
        record = replace(record, job=replace(record.job, id=f"{number}", start=start))
        (job / FILE).write_bytes(encode(record))

    monkeypatch.setattr(bench_ab, "run_avocado", run)
    monkeypatch.setenv("PAPRSCM_SUITE", "")
    monkeypatch.chdir(tmp_path)
    return seen


def test_jobs_alternate_and_are_compared(
    jobs: Jobs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["bench", "ab", "--smp", "1", "--b", "page_size=4k", "--rounds", "4"]
    assert cli.main([*words, "--tests", "tests/flush", "--", "--failfast"]) == 1
    assert "".join(side for side, _, _ in jobs) == "abbaabba"
    assert {side: values for side, values, _ in jobs} == {
        "a": {"smp": "1"},
        "b": {"smp": "1", "page_size": "4k"},
    }
    assert jobs[0][2] == [
        *("run", "--max-parallel-tasks=1", "--job-results-dir", "results/ab/a"),
        *("--failfast", "tests/flush"),
    ]
    out = capsys.readouterr().out
    assert "fsync" in out
    assert "worse: 1 metrics" in out
    # All jobs are there; more rounds run what is missing.
    assert cli.main([*words, "--tests", "tests/flush"]) == 1
    assert len(jobs) == 8
    assert cli.main([*words[:-1], "5", "--tests", "tests/flush"]) == 1
    assert [side for side, _, _ in jobs[8:]] == ["a", "b"]


def test_a_job_without_results_ends_the_bench(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole: Callable[[Sequence[str], Path], None] = vars(bench_ab)["run_avocado"]

    def third_is_killed(argv: Sequence[str], log_file: Path) -> None:
        whole(argv, log_file)
        if len(jobs) == 3:
            file = tmp_path / "results/ab/b/job-3" / FILE
            file.write_bytes(file.read_bytes().replace(b'"end":"2026', b'"end":null,"x":"2026'))

    with monkeypatch.context() as patch:
        patch.setattr(bench_ab, "run_avocado", third_is_killed)
        words = ["bench", "ab", "--b", "smp=1", "--rounds", "4"]
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert "the job did not end with results:\n    started\n    NO DISK" in err
        assert "the jobs so far stay in results/ab/b, and count" in err
    assert cli.main(words) == 1
    assert "".join(side for side, _, _ in jobs) == "abb" + "baabba"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "A and B have the same settings"),
        (["--a", "smp=1", "--b", "smp=1"], "A and B have the same settings"),
        (["--b", "smp"], "smp is not NAME=VALUE"),
        (["--b", "spm=1"], "there is no setting 'spm'"),
        (["--b", "smp=x"], "smp=x is not a number"),
        (["--b", "smp=1", "--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_wrong_words(
    jobs: Jobs, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["bench", "ab", *words]) == 2
    assert message in capsys.readouterr().err
    assert jobs == []


def test_avocado_ends_without_a_record(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="the job did not end with results"):
        bench_ab.run_job(["/bin/echo", "x"], tmp_path, 0)
