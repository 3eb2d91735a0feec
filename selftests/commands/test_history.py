# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm history` and `paprscm compare`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from records import example, make_record, make_test

from paprscm.commands import cli
from paprscm.results import record
from paprscm.results.record import FILE, encode


def write_job(folder: Path, number: int, status: str = "PASS", **changes: object) -> Path:
    """A job's folder with one test."""
    job = folder / f"job-{number}"
    job.mkdir(parents=True)
    start = f"2026-11-{number:02}T00:00:00+00:00"
    fields = {"id": f"{number:02}" * 20, "start": start, **changes}
    (job / FILE).write_bytes(encode(make_record(make_test("a", status), **fields)))
    return job


@contextmanager
def running(job: Path) -> Iterator[None]:
    handle = record.lock(job)
    yield
    os.close(handle)


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's folder for data."""
    folder = tmp_path / "data"
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_folders_that_cannot_be_read_do_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, last = write_job(tmp_path / "r", 1), write_job(tmp_path / "r", 2)
    cut = write_job(tmp_path, 3)
    (cut / FILE).write_bytes((cut / FILE).read_bytes()[:100])
    other = write_job(tmp_path, 4)
    (other / FILE).write_bytes(
        (other / FILE).read_bytes().replace(b"paprscm-results/1", b"paprscm-results/9")
    )
    no_time = write_job(tmp_path, 5, start="yesterday")
    live = write_job(tmp_path, 6, end=None)
    empty = tmp_path / "empty"
    empty.mkdir()
    folders = [good, cut, other, no_time, live, empty, tmp_path / "absent", last]
    with running(live):
        assert cli.main(["history", "import", *map(str, folders)]) == 1
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/data/paprscm/history.sqlite: 2 added, 6 refused\n"
    for text in (
        f"paprscm: {cut}/record.json is damaged: ",
        f"paprscm: {other}/record.json has the schema 'paprscm-results/9'",
        "paprscm: the start of job 0505",
        f"paprscm: {live}: the job still runs",
        f"paprscm: {empty} is not a job's folder",
        f"paprscm: {tmp_path}/absent does not exist",
    ):
        assert text in err
    # The job that ran was killed since.
    assert cli.main(["history", "import", str(live), "r"]) == 0
    assert capsys.readouterr().out.endswith(": 1 added, 2 present\n")


def test_a_folder_of_jobs_without_its_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        write_job(tmp_path / "r", number)
    (tmp_path / "r/latest").symlink_to("job-2")
    (tmp_path / "r/notes.txt").touch()
    assert cli.main(["history", "import", "r"]) == 0
    assert capsys.readouterr().out.endswith(": 2 added\n")


def test_a_folder_whose_name_is_not_utf_8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path / os.fsdecode(b"\xff\x1b[31m"), 1)
    assert cli.main(["history", "import", str(job)]) == 0
    assert cli.main(["history", "list"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_list_and_flaky(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, status in enumerate(("PASS", "FAIL", "PASS"), start=1):
        write_job(tmp_path / "r", number, status)
    cli.main(["history", "import", "r"])
    capsys.readouterr()
    assert cli.main(["history", "list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "6.12.117" in line]
    assert [row[:2] for row in rows] == [[f"0{n}" * 4, f"2026-11-0{n}"] for n in (1, 2, 3)]
    for words, ids in (
        (["--since", "2026-11-02"], ["02020202", "03030303"]),
        (["--until", "2026-11-02T00:00:00Z"], ["01010101"]),
        (["--last", "1"], ["03030303"]),
        (["--release", "6.12", "--qemu-version", "10", "--host", "EPYC", "--last", "1"], ["0303"]),
        (["--release", "7"], []),
    ):
        assert cli.main(["history", "list", *words]) == 0
        out = capsys.readouterr().out
        assert [i for i in ("01010101", "02020202", "03030303") if i in out] == [
            i for i in ("01010101", "02020202", "03030303") if any(i.startswith(p) for p in ids)
        ]
    assert "no such run" in out
    assert cli.main(["history", "flaky"]) == 0
    assert "2 of 2" in capsys.readouterr().out
    assert cli.main(["history", "flaky", "--last", "1"]) == 0
    assert "no verdict has changed" in capsys.readouterr().out


def test_wrong_dates_and_counts() -> None:
    for words in (["--since", "x"], ["--last", "0"], ["--last", "-1"]):
        with pytest.raises(SystemExit):
            cli.main(["history", "list", *words])


def test_there_is_no_history(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    for words in (["history", "list"], ["history", "flaky"], ["compare", "0101", "--", "0202"]):
        assert cli.main(words) == 2
        assert "has no history" in capsys.readouterr().err
    assert not data.exists()


def test_ids_of_equal_beginnings_are_shown_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        write_job(tmp_path / "r", number, id=f"123456789{number}")
    cli.main(["history", "import", "r"])
    cli.main(["history", "list"])
    out = capsys.readouterr().out
    assert "1234567891" in out
    assert "1234567892" in out


def test_compare_takes_folders_and_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(1, 9):
        write_job(tmp_path / ("a" if number < 5 else "b"), number, "PASS" if number < 5 else "FAIL")
    assert cli.main(["compare", "a", "--", "b"]) == 1
    assert "worse: 1 verdicts" in capsys.readouterr().out
    assert cli.main(["compare", "b", "--", "a"]) == 0
    assert "better: 1 verdicts" in capsys.readouterr().out
    cli.main(["history", "import", "b"])
    ids = [f"{number:02}{number:02}" for number in range(5, 9)]
    assert (
        cli.main(["compare", "--json", "a/job-1", "a/job-2", "a/job-3", "a/job-4", "--", *ids]) == 1
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["verdicts"][0]["change"] == "worse"
    assert [id_[:4] for id_ in found["b"]] == ids
    assert cli.main(["compare", "a/job-1", "--", "b/job-5"]) == 2
    assert "not comparable: noise unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "one set of runs is missing"),
        (["a", "--minimum", "-1", "--", "a"], "--minimum is a percentage"),
        (["a", "--", "a"], "is given twice"),
        (["a/b", "--", "a"], "a/b does not exist"),
    ],
)
def test_wrong_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    write_job(tmp_path / "a", 1)
    assert cli.main(["compare", *words]) == 2
    assert message in capsys.readouterr().err


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_library_is_missing(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(encode(example()))
    for module, words in (
        ("sqlalchemy", ["history", "import", str(tmp_path)]),
        ("alembic", ["history", "import", str(tmp_path)]),
        ("psycopg", ["history", "list", "--database", "postgresql://u@/x"]),
    ):
        done = run_python(
            f"import sys; sys.modules[{module!r}] = None\n"
            f"from paprscm.commands.cli import main\nsys.exit(main({words!r}))"
        )
        assert done.returncode == 3
        assert f"{module}, which the history needs, is not installed" in done.stderr
    # compare needs none for folders.
    done = run_python(
        "import sys; sys.modules['sqlalchemy'] = None\nfrom paprscm.commands.cli import main\n"
        f"sys.exit(main(['compare', {str(tmp_path)!r}, '--', {str(tmp_path)!r}]))"
    )
    assert "is given twice" in done.stderr


def test_the_command_starts_without_the_libraries() -> None:
    code = "import sys, paprscm.commands.cli; print(*sys.modules)"
    modules = set(run_python(code).stdout.split())
    assert "paprscm.commands.history" in modules
    assert modules.isdisjoint({"sqlalchemy", "alembic", "psycopg", "paprscm.history.store"})
