# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm results` and `paprscm rerun`."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
from records import GUEST, example, finding, make_record, make_test
from rich.console import Console

from paprscm.commands import cli
from paprscm.commands.results import parameters, reference
from paprscm.formats.registry import FILES
from paprscm.results.record import FILE, Record, encode
from paprscm.results.terminal import print_progress, print_summary


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / FILE).write_bytes(encode(example()))
    return tmp_path


def test_a_format_on_the_standard_output(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["results", str(job), "--format", "ktap"]) == 0
    assert capsys.readouterr().out.startswith("KTAP version 1\n")
    assert cli.main(["results", str(job), "--format", "kcidb", "--output", str(job / "k")]) == 0
    assert (job / "k").read_text().startswith("{")
    assert "tests without a kernel: 1" in capsys.readouterr().err


def test_several_formats_need_a_folder(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["results", str(job), "--format", "junit,ktap"]
    assert cli.main(words) == 2
    assert "--output is not a folder" in capsys.readouterr().err
    assert cli.main([*words, "--output", str(job)]) == 0
    assert {FILES["junit"], FILES["ktap"]} <= {file.name for file in job.iterdir()}
    assert cli.main(["results", str(job), "--output", str(job)]) == 2


def test_a_job_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["results"], ["rerun", "--failed"], ["branches"]):
        assert cli.main([*words, str(tmp_path)]) == 2
        assert "is not a job's folder: it has no record.json" in capsys.readouterr().err


def test_nothing_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE).write_bytes(encode(make_record(make_test("a"))))
    assert cli.main(["rerun", "--failed", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no test of {tmp_path} has failed\n"


# --- rerun


def with_settings(**settings: str) -> Record:
    record = make_record(make_test("a"), make_test("b"), parameters={"seed": "7", "smp": "4"})
    return replace(record, environments={"guest": replace(GUEST, settings=settings)})


def test_rerun_has_the_settings_of_the_job(tmp_path: Path) -> None:
    config = tmp_path / "avocado.cfg"
    record = with_settings(smp="4", page_size="4k")
    # The job's avocado.cfg had the page size; this one has not.
    assert parameters(record, config=config) == {"seed": "7", "smp": "4", "page_size": "4k"}
    config.write_text("[paprscm]\npage_size = 4k\n")
    assert parameters(record, config=config) == {"seed": "7", "smp": "4"}
    # This one has a setting that the job did not have.
    config.write_text("[paprscm]\npage_size = 4k\nmemory_mib = 4096\noffline = yes\n")
    assert parameters(record, config=config) == {
        **{"seed": "7", "smp": "4", "memory_mib": "1024", "offline": "no"}
    }
    killed = make_record(make_test("a", environment=None), parameters={"smp": "4"})
    assert parameters(replace(killed, environments={}), config=config) == {"smp": "4"}


def test_rerun_replaces_the_process(
    job: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[list[str]] = []

    def execute(_path: str, words: list[str]) -> int:
        calls.append(words)
        return 0

    monkeypatch.setattr(os, "execv", execute)
    monkeypatch.setenv("PAPRSCM_SUITE", "")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["rerun", "--failed", str(job), "--", "--failfast"]) == 0
    (words,) = calls
    references = [f"tests/flush/test_x.py:X.test_{n}$" for n in ("fail", "error", "interrupted")]
    assert words[1:] == ["run", "--failfast", *references]


def test_a_reference_matches_one_test() -> None:
    test = make_test("a")
    assert reference(replace(test, name="flush/test_x.py:X.a;v-1")) == "tests/flush/test_x.py:X.a$"
    assert reference(replace(test, name="bin/true", file="/bin/true")) == "/bin/true"


# --- the terminal


def printed(record: Record, width: int, folder: Path = Path("results/latest")) -> list[str]:
    """Lines of the end of the job on a terminal without colours."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    with console.capture() as captured:
        print_summary(console, record, folder, {record.tests[3].id: "console 1\nconsole 2"})
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [80, 160])
def test_the_end_of_a_job_fits_the_terminal(width: int) -> None:
    lines = printed(example(), width)
    assert all(len(line) <= width for line in lines if "results/latest" not in line)
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert "\x00" not in text
    assert "  contract   The contract of test_fail." in text
    assert "             hint: look at the console" in text
    assert "console 2" in text
    console = "results/latest/test-results/4/data/guest/console.log"
    assert f"  console    {console}" in [line.rstrip() for line in lines]
    assert "  run again  avocado run tests/flush/test_x.py:X.test_fail" in text
    assert "flush/test_x.py:X.test_remark: other text than in earlier versions" in text
    row = next(line.split() for line in lines if line.startswith(" flush"))
    assert row == ["flush", "1", "1", "1", "2", "1", "1", "1", "7.0", "s"]
    assert "paprscm rerun --failed results/latest" in text


def test_known_issues_are_counted() -> None:
    shows = make_test("a", "WARN", known_issues=(finding("linux-x"), finding("linux-yy")))
    again = make_test("b", "WARN", known_issues=(finding("linux-x"),))
    record = make_record(shows, again, make_test("c"), make_test("d"))
    lines = [line.rstrip() for line in printed(record, 100)]
    at = lines.index("Known issues")
    assert lines[at + 1 : at + 3] == [
        "   2x linux-x  linux-x breaks",
        "   1x linux-yy linux-yy breaks",
    ]


def test_many_failures_are_not_all_shown_in_full() -> None:
    tests = [make_test(f"t{n:02}", "FAIL", id=str(n), reason="x\n" * 50) for n in range(40)]
    text = "\n".join(printed(make_record(*tests), 100))
    assert text.count("  contract   ") == 10
    assert "… 38 more lines in the log" in text
    assert "and 20 more tests" in text


def test_progress_is_one_line_of_each_test() -> None:
    console = Console(file=io.StringIO(), width=60, highlight=False)

    def line(status: str, reason: str) -> list[str]:
        with console.capture() as captured:
            print_progress(
                console, status, "t.py:X.a", count=(7, 181), duration_s=2.25, reason=reason
            )
        return [text.rstrip() for text in captured.get().splitlines()]

    assert line("PASS", "<unknown>") == ["(  7/181) PASS   t.py:X.a  2.2 s"]
    # The end of the job has its known issues.
    assert line("WARN", "known issue a: b") == ["(  7/181) WARN   t.py:X.a  2.2 s"]
    first, second = line("FAIL", "\n\x1b[31mbroken " + "x" * 100 + "\nmore")
    assert first == "(  7/181) FAIL   t.py:X.a  2.2 s"
    assert second.strip().startswith("broken xxx")
    assert len(second) == 60


def test_wrong_settings_of_reports(job: Path) -> None:
    assert cli.main(["results", str(job), "--format", "kcidb", "--build", "x"]) == 2
    assert cli.main(["results", str(job), "--format", "kcidb", "--origin", "A B"]) == 2
