# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm report`: jobs' folders, errors, and the web server."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from records import example, make_record, make_test

from paprscm.commands.cli import main
from paprscm.results.record import FILE, Record, encode, lock


def write_job(folder: Path, record: Record | None = None) -> Path:
    """A job's folder with a record, and with the console of its failed test."""
    record = record or example()
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(encode(record))
    for test in record.tests:
        for log in test.logs:
            (folder / log).parent.mkdir(parents=True, exist_ok=True)
            (folder / log).write_text(f"\x1b[1mOops\x1b[0m in {test.name}\n")
    return folder


def report(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    status = main(["report", *map(str, words)])
    output, errors = capsys.readouterr()
    return status, output, errors


def test_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, site = write_job(tmp_path / "job"), tmp_path / "new" / "site"
    status, output, errors = report(capsys, job, "--output", site)
    assert (status, output, errors) == (0, f"{site / 'index.html'}: 1 run, 9 tests\n", "")
    (page,) = site.glob("tests/*test_fail-*.html")
    assert "Oops in flush/test_x.py:X.test_fail" in page.read_text()


def test_jobs_of_one_id_and_a_document_have_their_own_consoles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--force-job-id` gives several jobs one id."""
    logs = ("console/console.log",)
    first = make_record(make_test("a", "FAIL", logs=logs), start="2026-11-26T01:00:00+00:00")
    second = make_record(make_test("b", "FAIL", logs=logs))
    jobs = [write_job(tmp_path / "a", first) / FILE, write_job(tmp_path / "b", second)]
    assert report(capsys, *jobs, "--output", tmp_path / "site")[0] == 0
    for name in "ab":
        (page,) = (tmp_path / "site").glob(f"tests/*X-{name}-*.html")
        assert f"Oops in flush/test_x.py:X.{name}" in page.read_text()


def test_a_folder_of_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each job once; one that still runs and one that is damaged are left out, with a line."""
    for number in range(3):
        write_job(
            tmp_path / "results" / f"job-{number}", make_record(make_test("x"), id=f"{number}")
        )
    (tmp_path / "results/latest").symlink_to("job-3")
    running = write_job(tmp_path / "results/job-3", make_record(make_test("x"), end=None))
    (write_job(tmp_path / "results/job-4") / FILE).write_text('{"schema": "paprscm-results/2"}')
    handle = lock(running)
    try:
        status, output, errors = report(capsys, tmp_path / "results", "--output", tmp_path / "site")
    finally:
        os.close(handle)
    assert (status, output.rpartition(": ")[2]) == (0, "3 runs, 1 test\n")
    left_out = errors.splitlines()
    assert len(left_out) == 2 and all("left out: " in line for line in left_out)
    assert "still runs" in left_out[0] and "paprscm-results/2" in left_out[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda job: (job / FILE).write_text("{"), "is damaged"),
        (lambda job: (job / FILE).write_text('{"schema": "x"}'), "has the schema 'x'"),
        (lambda job: (job / FILE).unlink(), "is not a job's folder"),
    ],
    ids=["damaged", "version", "none"],
)
def test_a_named_folder_has_to_be_usable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object, message: str
) -> None:
    assert callable(change)
    job = write_job(tmp_path / "job")
    change(job)
    good = write_job(tmp_path / "good")
    status, output, errors = report(capsys, good, job, "--output", tmp_path / "site")
    assert (status, output) == (2, "") and message in errors
    assert not (tmp_path / "site").exists()


def test_runs_of_the_history(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored runs and those of folders are in one site; a run that is in both is one run."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    site = tmp_path / "site"
    failed = make_test("x", "FAIL", logs=("console/console.log",))
    for number in (1, 2, 3):
        record = make_record(failed, id=f"{number}", start=f"2026-11-0{number}T00:00:00+00:00")
        write_job(tmp_path / f"job-{number}", record)
    main(["history", "import", str(tmp_path / "job-1"), str(tmp_path / "job-2")])
    capsys.readouterr()
    for words, runs in (
        ((), "2 runs"),
        (("--last", "1"), "1 run"),
        ((tmp_path / "job-2", tmp_path / "job-3"), "3 runs"),
    ):
        status, output, errors = report(capsys, *words, "--history", "--output", site)
        assert (status, errors) == (0, "") and output.endswith(f": {runs}, 1 test\n")
    assert "Oops in" in next(site.glob("tests/*")).read_text()
    status, _, errors = report(capsys, tmp_path / "job-1", "--last", "1", "--output", site)
    assert status == 2 and "selection of runs without --history" in errors


def test_an_output_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, errors = report(capsys)
    assert status == 2 and "neither --output nor --serve" in errors


@pytest.mark.skipif(os.geteuid() != 0, reason="mount(2) needs root")
def test_a_real_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path / "job")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", disk]).returncode:
        pytest.skip("mount(2) is not permitted here")
    try:
        status, _, errors = report(capsys, job, "--output", disk / "site")
        assert status == 2 and "site was not written: No space left on device" in errors
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# --- the server


@contextmanager
def served(job: Path, *words: str) -> Iterator[str]:
    """Address of a server that ends on SIGINT with status 0."""
    program = Path(sys.executable).with_name("paprscm")
    environ = {**os.environ, "TMPDIR": str(job.parent)}
    process = subprocess.Popen(
        [program, "report", job, "--serve", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=environ,
        # A test that runs in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        match = re.match(r"(http://127\.0\.0\.1:\d+/) ", process.stdout.readline())
        assert match
        yield match[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_server_is_for_this_machine_and_this_site(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job")
    (tmp_path / "secret").write_text("secret")
    with served(job) as url:
        assert [file for file in tmp_path.iterdir() if file.name.startswith("paprscm-report-")]
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310
            assert b"tests are broken" in answer.read()
            assert answer.headers["Cache-Control"] == "no-cache"
        assert status_of(f"{url}data/index.js") == 200
        assert status_of(f"{url}tests/") == 404
        assert status_of(f"{url}../secret") == 404
        assert status_of(f"{url}%2e%2e/secret") == 404
        port = int(url.rstrip("/").rpartition(":")[2])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=10)
    # The site without --output was a temporary one.
    assert {file.name for file in tmp_path.iterdir()} == {"job", "secret"}


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path / "job")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, errors = report(capsys, job, "--output", tmp_path / "site", "--serve", str(port))
    assert status == 2 and f"--serve {port}: " in errors and "free port" in errors


def test_the_help_names_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    text = capsys.readouterr().out
    assert "--output SITE" in text and "127.0.0.1" in text
