# SPDX-License-Identifier: GPL-2.0-or-later
"""The record of a job: its schema, its document, and damaged or foreign folders."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from records import example, finding, make_record, make_test

from paprscm.errors import ConfigError
from paprscm.paths import ROOT
from paprscm.results import record
from paprscm.results.observations import Observations, harmless, read_whiteboard
from paprscm.results.record import FILE, Metric, Record, encode, read_record
from paprscm.results.writer import Writer

SCHEMA_FILE = ROOT / "paprscm" / "results" / "record.schema.json"


@pytest.fixture
def schema() -> Any:
    return json.loads(SCHEMA_FILE.read_text())


def write(folder: Path, content: Record | bytes) -> Path:
    """A job's folder with this document."""
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(encode(content) if isinstance(content, Record) else content)
    return folder


def test_the_schema_in_the_package_is_that_of_the_classes(schema: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema == record.schema()


def test_a_document_fits_the_schema_and_is_read_back(schema: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, example())
    jsonschema.validate(json.loads((folder / FILE).read_text()), schema)
    assert read_record(folder) == read_record(folder / FILE) == example()


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document["job"].pop("id"),
        lambda document: document["tests"][0].update(status="GREEN"),
        lambda document: document["tests"][0]["metrics"][0].update(value="fast"),
        lambda document: document["host"].update(cores=None),
    ],
)
def test_schema_and_reader_refuse_the_same(
    schema: Any, tmp_path: Path, damage: Callable[[Any], object]
) -> None:
    document = json.loads(encode(example()))
    damage(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)
    with pytest.raises(ConfigError, match=f"{FILE} is damaged: "):
        read_record(write(tmp_path, json.dumps(document).encode()))


def test_unknown_fields_of_a_later_writer_are_ignored(tmp_path: Path) -> None:
    document = json.loads(encode(example()))
    document["job"]["colour"] = document["tests"][0]["mood"] = "green"
    assert read_record(write(tmp_path, json.dumps(document).encode())) == example()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_is_finite(value: float) -> None:
    with pytest.raises(ValueError, match="which JSON cannot hold"):
        Metric(name="x", value=value, unit="s")


def test_a_test_refers_to_an_environment_of_the_record() -> None:
    with pytest.raises(ValueError, match="unknown environment other"):
        make_record(make_test("a", environment="other"))


def test_the_environment_of_a_killed_test_is_that_of_most() -> None:
    killed = make_test("killed", environment=None)
    tests = make_test("a", environment="bare"), make_test("b"), make_test("c"), killed
    result = make_record(*tests)
    assert result.environment(killed) == result.environments["guest"]
    assert result.environment(tests[0]) == result.environments["bare"]
    assert make_record(killed).environment(killed) is None


# --- folders


def _cut(folder: Path) -> None:
    write(folder, encode(example())[:-200])


def _other_version(folder: Path) -> None:
    write(folder, encode(example()).replace(b"paprscm-results/1", b"paprscm-results/9"))


def _foreign(folder: Path) -> None:
    write(folder, b'{"job_id": "x", "tests": []}')


def _not_utf8(folder: Path) -> None:
    write(folder, b'{"schema": "\xff\xfe"}')


def _deep(folder: Path) -> None:
    write(folder, encode(example()).replace(b'"facts":{}', b'"facts":{"a":' + b"[" * 99999, 1))


def _unknown_environment(folder: Path) -> None:
    write(folder, encode(example()).replace(b'"environment":"bare"', b'"environment":"new"'))


def _earlier_job(folder: Path) -> None:
    (folder / "job.log").touch()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is not a job's folder: it has no record.json"),
        (Path.rmdir, "does not exist"),
        (lambda folder: (folder.rmdir(), folder.touch()), "is damaged: "),
        (lambda folder: (folder / FILE).mkdir(), "cannot be read: Is a directory"),
        (_earlier_job, "is a job's folder without record.json"),
        (_cut, "is damaged: "),
        (_foreign, "is damaged: "),
        (_not_utf8, "is damaged: "),
        (_deep, "is damaged: "),
        (_unknown_environment, "is damaged: .*refers to an unknown environment new"),
        (_other_version, "has the schema 'paprscm-results/9'; this paprscm reads"),
    ],
)
def test_other_folders_are_refused(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    make(folder)
    with pytest.raises(ConfigError, match=message):
        read_record(folder)


# --- a job that runs, and one that was killed

JOB = """
import os, signal, sys, time
from pathlib import Path
from records import START, make_record, make_test
from paprscm.results.writer import Writer

tests = [make_test(name, "PLANNED", id=name, times=None, environment=None) for name in "abcd"]
writer = Writer(Path(sys.argv[1]), make_record(end=None, status=None), tests)
for name, status in (("a", "PASS"), ("b", "FAIL"), ("c", "RUNNING")):
    writer.update(make_test(name, status, id=name))
print("ready", flush=True)
time.sleep(600)
"""


def test_a_running_job_is_refused_and_a_killed_one_is_read(tmp_path: Path) -> None:
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, tmp_path],
        cwd=ROOT / "selftests",
        stdout=subprocess.PIPE,
        text=True,
    )
    with job:
        try:
            assert job.stdout is not None
            assert job.stdout.readline() == "ready\n"
            with pytest.raises(ConfigError, match="the job still runs; 2 of 4 tests have ended"):
                read_record(tmp_path)
        finally:
            job.kill()
    result = read_record(tmp_path)
    assert result.job.end is None
    assert [(test.name[-1], test.status) for test in result.tests] == [
        *(("a", "PASS"), ("b", "FAIL"), ("c", "INTERRUPTED"), ("d", "INTERRUPTED"))
    ]
    reasons = [test.reason for test in result.tests[2:]]
    assert reasons == ["the job was killed while this test ran", "not started: the job was killed"]


def test_every_moment_of_a_job_leaves_a_complete_document(tmp_path: Path) -> None:
    writer = Writer(
        tmp_path,
        make_record(end=None, status=None),
        (make_test(str(n), "PLANNED", id=str(n)) for n in range(20)),
    )
    inodes = set()
    for number in range(20):
        writer.update(make_test(str(number), id=str(number)))
        document = json.loads((tmp_path / FILE).read_text())
        assert [test["status"] for test in document["tests"]].count("PASS") == number + 1
        inodes.add((tmp_path / FILE).stat().st_ino)
    # Replaced, not written to: a reader never sees half a document.
    assert len(inodes) > 1
    result = writer.close(end="2026-11-27T02:47:06+00:00", status=0, interruption=None)
    assert read_record(tmp_path) == result
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE]


def test_equal_environments_are_stored_once(tmp_path: Path) -> None:
    empty = replace(make_record(), environments={})
    writer = Writer(
        tmp_path, empty, (make_test(n, "PLANNED", id=n, environment=None) for n in "abc")
    )
    guest, bare = make_record().environments.values()
    for name, environment in (("a", guest), ("b", replace(guest)), ("c", bare)):
        writer.update(make_test(name, id=name, environment=None), environment)
    result = writer.close(end="x", status=0, interruption=None)
    assert len(result.environments) == 2
    assert [result.environment(test) for test in result.tests] == [guest, guest, bare]


def test_a_disk_that_is_full_keeps_the_last_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path, make_record(), [make_test("a", "PLANNED", id="a")])

    def full(_file: Path, _mode: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        writer.update(make_test("a", id="a"))
        assert writer.problem is not None
    assert json.loads((tmp_path / FILE).read_text())["tests"][0]["status"] == "PLANNED"
    assert writer.close(end="x", status=0, interruption=None).tests[0].status == "PASS"
    assert writer.problem is None
    assert read_record(tmp_path).tests[0].status == "PASS"


# --- observations


def test_observations_travel_as_text() -> None:
    observed = Observations(
        environment=make_record().environments["guest"],
        metrics=[Metric(name="x", value=1.5, unit="s", dimensions={"a": "b"})],
        facts={"list": [1, None, {"a": 2.5}]},
        known_issues=[finding("linux-x")],
        reason="it broke",
        activities={"starts": 1.0},
        cpu_s=0.5,
    )
    assert read_whiteboard(observed.as_json()) == observed


def test_facts_that_json_cannot_represent_become_texts() -> None:
    facts: dict[Any, Any] = {"lone \udc80": "\udcff", "nan": math.nan, "inf": [math.inf], 3: (1, 2)}
    assert harmless(facts) == {"lone ?": "?", "nan": "nan", "inf": ["inf"], "3": [1, 2]}
    assert read_whiteboard(Observations(facts=dict(facts)).as_json()).facts == harmless(facts)


@pytest.mark.parametrize("text", [None, "", "no JSON", "[]", '{"facts": 3}', "\udc80", '"x"'])
def test_a_foreign_whiteboard_contains_nothing(text: str | None) -> None:
    assert read_whiteboard(text) == Observations()


# --- updates of known issues


def test_updates_of_a_job() -> None:
    def one(name: str, version: str, update: str | None, *, shows: bool = False) -> Any:
        return finding(name, version=version, update=update, shows=shows)

    tests = [
        make_test("1", known_issues=(one("a", "7", "a is gone on 7"),)),
        make_test("2", known_issues=(one("a", "7", "a is gone on 7"),)),
        make_test("3", known_issues=(one("b", "7", "b is gone on 7"),)),
        # A test shows it on 7, so only the update for 8 counts.
        make_test("4", known_issues=(one("b", "7", None, shows=True),)),
        make_test("5", known_issues=(one("b", "8", "b is gone on 8"), one("d", "7", None))),
        make_test("6", known_issues=(one("c", "7", "c shows on 7", shows=True),)),
        make_test("7"),
    ]
    assert record.updates(tests) == ["a is gone on 7", "b is gone on 8", "c shows on 7"]
