# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm bench`: its figures are correct, and it leaves no process or file behind."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from records import make_record, make_test
from rich.console import Console
from rich.table import Table

from paprscm import settings
from paprscm.commands import bench_starts, bench_suite, cli
from paprscm.commands.bench_suite import Job, JobTest, Plan
from paprscm.commands.leaks import LeakWatch, check_digests
from paprscm.commands.series import Series
from paprscm.commands.suite_time import JobTime
from paprscm.errors import CapabilityError, ConfigError, HostError
from paprscm.guest.environment import Environment, prepare
from paprscm.host.cache import Cache
from paprscm.paths import ROOT
from paprscm.results.record import FILE, Metric, encode
from paprscm.settings import Settings
from paprscm.timesheet import ACTIVITIES

SNAPSHOT = SimpleNamespace(folder=Path("/nonexistent"))


def printed(table: Table) -> str:
    """The table on a terminal of 110 columns."""
    console = Console(width=110, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def made_of(*, snapshot: bool = True, **chosen: Any) -> Environment:
    """An environment with the attributes that a plan needs."""
    environment = SimpleNamespace(
        settings=Settings(**chosen),
        snapshot=SNAPSHOT if snapshot else None,
        describe=lambda: {"qemu": "7.2"},
    )
    return cast(Environment, environment)


def job(mode: str, **statuses: str) -> Job:
    """A job with these statuses; other values are constant."""
    tests = {
        name: JobTest(status, 2.0, "" if status == "PASS" else "expected 1, found 2")
        for name, status in statuses.items()
    }
    time = JobTime({"starts": 4.0, "idle": 6.0}, {"starts": 2}, 3.0, ())
    return Job(mode=mode, duration_s=10.0, tests=tests, restored=1, booted=1, time=time)


# --- the series


def test_the_table_of_starts_has_a_row_for_each_mark() -> None:
    values = {
        f"{kind} {mark}": [scale * place, scale * place * 2, scale * place * 4]
        for kind, scale in (("warm", 0.1), ("cold", 1.0))
        for place, mark in enumerate(bench_starts.MARKS[kind], start=1)
    }
    shown = printed(bench_starts.start_table(Series({}, 1.0, "s", values))).splitlines()
    assert shown[0].startswith("3 starts of each kind with two pmem=off DIMMs")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown if "│" in line]
    # Median, minimum, maximum and the quartiles of n, 2n, 4n.
    assert rows[0] == ["warm", "state loaded", "0.20", "0.10", "0.40", "0.15-0.30"]
    assert rows[-1] == ["cold", "first command answered", "10.00", "5.00", "20.00", "7.50-15.00"]
    assert [row[0] for row in rows] == ["warm"] * 5 + ["cold"] * 5


def test_the_title_names_the_only_kind_of_a_series() -> None:
    series = Series({}, 1.0, "s", {"warm ssh": [0.5]})
    assert printed(bench_starts.start_table(series)).startswith("1 warm start with")


def test_the_middle_half_lies_within_the_values() -> None:
    spread = Series({}, 1.0, "s", {"ssh": [1.0, 2.0]}).summary()["ssh"]
    assert spread["min"] <= spread["p25"] <= spread["median"] <= spread["p75"] <= spread["max"]


# --- the suite


def test_a_status_that_differs_is_reported_with_its_reason() -> None:
    jobs = [
        job("cold", a="PASS", b="PASS", c="WARN"),
        job("warm", a="PASS", b="FAIL", c="WARN"),
        job("cold", a="PASS", b="PASS", c="WARN"),
        job("warm", a="PASS", b="PASS"),
    ]
    assert bench_suite.status_differences(jobs[:1]) == []
    assert bench_suite.status_differences(jobs) == [
        "b has different statuses: cold PASS PASS, warm FAIL PASS"
        " (FAIL in warm: expected 1, found 2)",
        "c has different statuses: cold WARN WARN, warm WARN (not run)"
        " (WARN in cold: expected 1, found 2)",
    ]


def test_the_series_of_the_suite_and_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    durations_s = iter([30.0, 10.0, 6.0, 12.0, 7.0, 40.0])

    def fake(_plan: Plan, mode: str, folder: Path, _scratch: Path) -> Job:
        assert folder.is_dir()
        done = job(mode, a="PASS", b="PASS", c="CANCEL")
        return dataclasses.replace(done, duration_s=next(durations_s), restored=int(mode != "cold"))

    monkeypatch.setattr(bench_suite, "_job", fake)
    plan = bench_suite.select_modes(made_of(), bench_suite.MODES, tests=["tests/"], chosen={})
    series, doubts = bench_suite.measure_suite(dataclasses.replace(plan, concurrent=3), 2)
    assert doubts == []
    # Each round begins with another mode.
    assert series.values["cold job"] == [30.0, 40.0]
    assert series.values["parallel job"] == [6.0, 7.0]
    assert series.values["warm all tests"] == [6.0, 6.0]
    assert series.values["warm starts"] == [4.0, 4.0]
    assert series.values["cold CPU"] == [3.0, 3.0]
    report = json.loads(series.as_json())
    assert report["summary"]["parallel idle"]["median"] == 6.0
    assert report["found"]["counts"]["cold"] == [{"starts": 2}] * 2
    assert report["found"]["statuses"]["warm"] == [{"PASS": 2, "CANCEL": 1}] * 2
    assert report["found"]["guests"]["cold"] == [{"restored": 0, "booted": 1}] * 2
    assert report["environment"]["side_by_side"] == "3"
    rows = [line for line in printed(bench_suite.suite_table(series)).splitlines() if "│" in line]
    assert [word in rows[0] for word in ("cold, sequential", "35.0", "30.0-40.0")] == [True] * 3
    assert "warm, 3 concurrent" in rows[2]
    assert "2 PASS, 1 CANCEL" in rows[2]


def test_a_leak_of_a_job_is_a_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(_plan: Plan, mode: str, _folder: Path, scratch: Path) -> Job:
        (scratch / "paprscm-lost").touch()
        return job(mode, a="PASS")

    monkeypatch.setattr(bench_suite, "_job", fake)
    monkeypatch.setattr("paprscm.commands.leaks._SETTLE_S", 0.0)
    plan = bench_suite.select_modes(made_of(), ("cold",), tests=["tests/"], chosen={})
    _series, (doubt,) = bench_suite.measure_suite(plan, 1)
    assert "1 file in the scratch folder (paprscm-lost)" in doubt


def test_a_snapshot_that_a_job_loses_is_a_doubt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fake(_plan: Plan, mode: str, _folder: Path, _scratch: Path) -> Job:
        tmp_path.joinpath("snapshot").rename(tmp_path / "gone")
        return job(mode, a="PASS")

    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr(SNAPSHOT, "folder", tmp_path / "snapshot")
    monkeypatch.setattr(bench_suite, "_job", fake)
    plan = bench_suite.select_modes(made_of(), ("warm",), tests=["tests/"], chosen={})
    _series, (doubt,) = bench_suite.measure_suite(plan, 1)
    assert doubt.endswith("the snapshot was lost, so later guests were booted")


def test_a_job_is_a_run_with_the_same_settings() -> None:
    plan = bench_suite.select_modes(
        made_of(),
        bench_suite.MODES,
        tests=["tests/test_x.py"],
        chosen={"smp": "1", "start": "auto"},
        words=["-t", "device"],
    )
    plan = dataclasses.replace(plan, concurrent=4)
    for mode, start, at_once in (("cold", "cold", 1), ("warm", "auto", 1), ("parallel", "auto", 4)):
        argv = plan.argv(mode, results=Path("/r"), scratch=Path("/s"))
        assert argv[1:] == [
            *("run", "-t", "device", f"--max-parallel-tasks={at_once}"),
            *("--job-results-dir", "/r", "tests/test_x.py"),
            *("-p", "smp=1", "-p", f"start={start}", "-p", "scratch_dir=/s"),
        ]


def test_without_a_snapshot_only_cold_jobs_are_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="avocado.paprscm"):
        plan = bench_suite.select_modes(
            made_of(snapshot=False), bench_suite.MODES, tests=[], chosen={}
        )
    assert plan.modes == ("cold",)
    assert "there is no snapshot" in caplog.text
    with pytest.raises(CapabilityError, match="there is no snapshot"):
        bench_suite.select_modes(made_of(snapshot=False), ("warm",), tests=[], chosen={})


def test_modes_by_name() -> None:
    assert bench_suite.parse_modes("warm,cold,warm") == ("warm", "cold")
    for text in ("warm,hot", ","):
        with pytest.raises(ConfigError):
            bench_suite.parse_modes(text)


def test_the_record_of_a_job_is_read(tmp_path: Path) -> None:
    def start(guest: str, mark: str) -> Metric:
        dimensions = {"guest": guest, "mark": mark}
        return Metric(name="guest_start", value=0.1, unit="s", dimensions=dimensions)

    starts = start("guest", "restored"), start("guest", "commands"), start("guest2", "banner")
    record = make_record(
        make_test("a", "PASS", 1.5, id="1", metrics=starts),
        make_test("b", "FAIL", 2.5, id="2", reason="it lied\nmore"),
        make_test("c", "SKIP", id="3", times=None),
    )
    (tmp_path / "job-2026").mkdir()
    (tmp_path / "job-2026" / FILE).write_bytes(encode(record))
    job = bench_suite.read_job(tmp_path, "parallel", 10.0, 13.0, slots=2)
    assert (job.time.seconds["no record"], job.time.seconds["idle"]) == (4.0, 1.0)
    assert job.tests["flush/test_x.py:X.b"] == JobTest("FAIL", 2.5, "it lied")
    assert job.tests["flush/test_x.py:X.c"] == JobTest("SKIP", 0.0, "")
    assert (job.restored, job.booted) == (1, 1)
    assert job.statuses == {"PASS": 1, "FAIL": 1, "SKIP": 1}


def test_a_job_without_tests_shows_avocado_s_output(tmp_path: Path) -> None:
    (tmp_path / "avocado.log").write_text("guests cannot be prepared; no test was started\n")
    with pytest.raises(HostError, match="no test was started"):
        bench_suite.read_job(tmp_path, "cold", 0.0, 1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["start", "-n", "0"], "-n must be at least 1"),
        (["suite", "-n", "0"], "-n must be at least 1"),
        (["suite", "--modes", "hot"], "there is no mode 'hot'"),
        (["suite", "--modes", "warm", "--start", "cold"], "--modes=warm with start=cold"),
        (["start", "--warm-only", "--start", "cold"], "--warm-only with start=cold"),
    ],
)
def test_bad_input(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["bench", *words, "--cache-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"paprscm: {message}")


# --- what is left behind


def test_an_ended_process_is_not_a_leak(tmp_path: Path) -> None:
    watch = LeakWatch(tmp_path)
    before = watch.look()
    process = subprocess.Popen(["sleep", "0.3"])
    # compare() waits for a process that is about to end.
    threading.Thread(target=process.wait).start()
    left = watch.compare(before)
    assert left.problems == ()
    assert str(left).startswith("nothing left behind: no process, no file; descriptors ")


def test_each_leak_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paprscm.commands.leaks._SETTLE_S", 0.0)
    watch = LeakWatch(tmp_path)
    before = watch.look()
    # Its parent has ended, so it is not a descendant of this process.
    done = subprocess.run(
        ["sh", "-c", "sleep 60 > /dev/null & echo $!"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    orphan = int(done.stdout)
    enough = threading.Event()
    waiting = threading.Thread(target=enough.wait)
    waiting.start()
    try:
        with (tmp_path / "backing").open("w"):
            left = watch.compare(before)
    finally:
        os.kill(orphan, 9)
        enough.set()
        waiting.join()
    now, threads = before.descriptors, before.threads
    assert left.problems == (
        f"1 process ({orphan} sleep)",
        "1 file in the scratch folder (backing)",
        f"{now + 1} descriptors instead of {now}",
        f"{threads + 1} threads instead of {threads}",
    )
    assert str(left).startswith(f"left behind: 1 process ({orphan} sleep); ")


def test_a_changed_file_of_the_snapshot_is_detected_with_the_same_time(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "memory").write_bytes(b"guest")
        (folder / "state").write_bytes(b"state")

    entry = Cache(tmp_path).ensure("snapshot", {"a": "b"}, build)
    assert check_digests(entry.path) == (2, [])
    memory = entry.path / "memory"
    when = memory.stat().st_mtime_ns
    memory.write_bytes(b"guesT")
    os.utime(memory, ns=(when, when))
    (entry.path / "state").unlink()
    assert check_digests(entry.path) == (0, ["memory was changed", "state is missing"])


# --- with guests


@pytest.fixture(scope="module")
def warm() -> Environment:
    """Environment for guests, with a snapshot if this QEMU supports one."""
    return prepare(settings.load(config=ROOT / "avocado.cfg"), make_snapshot=True)


def paprscm(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a new process."""
    return subprocess.run(
        [sys.executable, "-m", "paprscm.commands.cli", *words],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "110"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.guest
def test_bench_start_prints_both_kinds_and_leaves_nothing(
    warm: Environment, tmp_path: Path
) -> None:
    file = tmp_path / "series.jsonl"
    done = paprscm("bench", "start", "-n", "2", "--series", str(file))
    assert done.returncode == 0, done.stderr
    kinds = {"warm", "cold"} if warm.snapshot else {"cold"}
    summary = json.loads(file.read_text())["summary"]
    for kind in kinds:
        median = f"{summary[f'{kind} command']['median']:.2f}"
        rows = [line for line in done.stdout.splitlines() if kind in line]
        assert any("first command answered" in row and median in row for row in rows), done.stdout
    assert {name.split()[0] for name in summary} == kinds
    assert "nothing left behind: no process, no file" in done.stdout


@pytest.mark.guest
def test_a_failed_warm_start_is_an_error(warm: Environment, tmp_path: Path) -> None:
    if warm.snapshot is None:
        pytest.skip("guests of this QEMU are not restored")
    broken = tmp_path / "snapshot"
    broken.mkdir()
    for name in ("memory", "console.log", "manifest.json"):
        (broken / name).symlink_to(warm.snapshot.folder / name)
    (broken / "state").write_bytes(warm.snapshot.state.read_bytes()[:100_000])
    environment = dataclasses.replace(
        warm, snapshot=dataclasses.replace(warm.snapshot, folder=broken)
    )
    began = time.monotonic()
    with pytest.raises(HostError, match="warm-up: QEMU does not load the snapshot") as caught:
        bench_starts.measure_starts(environment, 1, failed=tmp_path / "failed")
    assert (tmp_path / "failed" / "qemu.log").exists(), caught.value
    assert time.monotonic() - began < 30


@pytest.mark.guest
def test_bench_suite_finds_the_same_in_each_mode(warm: Environment, tmp_path: Path) -> None:
    file = tmp_path / "series.jsonl"
    tests = (
        "tests/device/test_validation.py:Validation.test_uuid_used_twice",
        "tests/map_sync/test_map_sync.py:NotDax.test_tmpfs",
    )
    done = paprscm(
        *("bench", "suite", "--json", "--keep", "--series", str(file)),
        *("--tests", *tests),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    series = json.loads(done.stdout)
    assert series == json.loads(file.read_text())
    modes = bench_suite.MODES if warm.snapshot else ("cold",)
    found = series["found"]
    assert set(found["modes"]) == set(modes)
    assert found["doubts"] == []
    assert len({json.dumps(found["statuses"][mode]) for mode in modes}) == 1
    assert sum(found["statuses"]["cold"][0].values()) == len(tests)
    for mode in modes:
        restored = int(mode != "cold")
        assert found["guests"][mode] == [{"restored": restored, "booted": 1 - restored}]
        assert found["unrecorded"][mode] == [[]]
        # One guest, and one attempt to start a QEMU.
        assert found["counts"][mode][0]["starts"] == 2
        times = {name: series["values"][f"{mode} {name}"][0] for name in (*ACTIVITIES, "Avocado")}
        assert min(times.values()) >= 0
        assert 0 < times["starts"] < series["values"][f"{mode} all tests"][0]
        for name in ("job start", "job end"):
            assert series["values"][f"{mode} {name}"][0] > 0
    kept = list((tmp_path / "bench-suite").glob("*/job-*/results.json"))
    assert len(kept) == len(modes)
