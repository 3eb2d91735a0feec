# SPDX-License-Identifier: GPL-2.0-or-later
"""The formats of a job's results, checked with the libraries and schemas that receivers use."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from junitparser import JUnitXml
from kcidb_io.schema.v05_03 import Version
from markdown_it import MarkdownIt
from records import BARE, example, finding, make_record, make_test

from paprscm import settings
from paprscm.debian.kernel_source import SOURCE_KIND
from paprscm.errors import ConfigError
from paprscm.formats import junit, kcidb, ktap, lava, squad, summary
from paprscm.formats.context import Context, read_context
from paprscm.formats.registry import FILES, FORMATS, parse_names
from paprscm.host.cache import Cache
from paprscm.results import labels
from paprscm.results.files import publish
from paprscm.results.record import Metric, Record
from paprscm.results.text import _HARMFUL, last_lines, plain, unique

FAILED = "1-tests/flush/test_x.py:X.test_fail"
CONSOLE = "[ 1.0] \x1b[1mpanic\x1b[0m ]]> </system-out> ``` \x00\nreboot: System halted\nok 1 evil"
CONTEXT = Context(excerpts={FAILED: plain(CONSOLE)})
HOSTILE = (
    "ok 9 evil\nnot ok 1 x\nKTAP version 1\n# Subtest: evil\nSubtest: evil\n1..99\n"
    "List of all partitions:\n<LAVA_SIGNAL_TESTCASE TEST_CASE_ID=evil RESULT=fail>\n````\n| a |\n"
    "# evil\n<script>alert(1)</script>\x1b]0;title\x07\x9b31m"
)


def hostile() -> Record:
    """The example, and names and reasons made to mislead."""
    return make_record(
        *example().tests,
        make_test("test_hostile", "FAIL", reason=HOSTILE, contract=HOSTILE, subject="<b>"),
        replace(make_test("w", "CANCEL", reason="# SKIP # a"), name="a b#/c.py:X y.t # SKIP;v/1"),
        make_test("test_" + "long" * 200, metrics=(Metric(name="m" * 300, value=1, unit="s"),)),
    )


def test_each_format_has_a_file() -> None:
    assert FORMATS.keys() == FILES.keys()
    assert parse_names("junit,ktap") == ("junit", "ktap")
    assert parse_names("") == ()
    with pytest.raises(ConfigError, match="unknown format 'tap'"):
        parse_names("junit,tap")


@pytest.mark.parametrize("name", FORMATS)
def test_no_format_fails_on_hostile_or_missing_content(name: str) -> None:
    for record in (hostile(), make_record(), make_record(make_test("a", environment=None))):
        text = FORMATS[name](record, CONTEXT)
        text.encode()
        # JSON is for programs: it keeps the text, and escapes only control characters.
        harmful = "[\\x00-\\x08\\x0b-\\x1f]" if name == "json" else _HARMFUL
        assert not re.search(harmful, text)
        assert FORMATS[name](record, CONTEXT) == text


# --- JUnit


def test_junit_is_read_back() -> None:
    text = junit.render(hostile(), CONTEXT)
    xml = JUnitXml.fromstring(text.encode())
    # The second parser knows no junitparser.
    root = ElementTree.fromstring(text)  # noqa: S314
    assert (xml.tests, xml.failures, xml.errors, xml.skipped) == (12, 2, 2, 3)
    cases = {case.get("name"): case for case in root.iter("testcase")}
    failure = cases["test_fail"].find("failure")
    assert failure is not None and failure.text is not None
    assert failure.get("message", "").startswith('a red </testcase>]]> & "q"')
    assert "hint: look at the console" in failure.text
    assert "panic ]]> </system-out> ```" in failure.text
    skipped = cases["test_cancel"].find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "no libpmem"
    assert cases["test_warn"].find("failure") is None
    # GitLab takes it as the suite.
    assert cases["test_warn"].get("classname") == "flush.test_x.X"
    properties = {p.get("name"): p.get("value") for p in cases["test_warn"].iter("property")}
    assert properties["known issue linux-loses-error"] == "shows on Linux 6.12.117-paprscm"
    assert properties["contract"] == "The contract of test_warn."
    suites = [suite.get("name") for suite in root.iter("testsuite")]
    assert suites[1] == "QEMU 10.0.13 without a kernel"


# --- KTAP


@pytest.fixture(scope="session")
def kunit() -> Path:
    """kunit.py of a kernel source in the cache, unpacked once."""
    cache = Cache(settings.load().cache_dir)
    sources = [entry for entry in cache.entries() if entry.kind == SOURCE_KIND]
    if not sources:
        pytest.skip("no kernel source in the cache: `paprscm kernel build` fetches one")
    tarball = sources[0].path / "linux.tar.xz"

    # kunit.py ends with status 1 and without a word in a folder of another name.
    place = Path("tools/testing/kunit")

    def unpack(folder: Path) -> None:
        (folder / place).mkdir(parents=True)
        with tarfile.open(tarball) as source:
            for member in source:
                path = Path(member.name.partition("/")[2])
                if path.parent == place and path.suffix == ".py":
                    content = source.extractfile(member)
                    assert content is not None
                    (folder / path).write_bytes(content.read())

    entry = cache.ensure("kunit", {"source": cache.identity(tarball)}, unpack)
    return entry.path / place / "kunit.py"


def test_the_kernel_s_parser_reads_ktap(kunit: Path, tmp_path: Path) -> None:
    record = hostile()
    file = tmp_path / "results.ktap"
    file.write_text(ktap.render(record, CONTEXT))
    parsed = subprocess.run(
        [sys.executable, kunit, "parse", file], capture_output=True, text=True, check=False
    )
    assert "errors" not in parsed.stdout
    assert "[ERROR]" not in parsed.stdout
    assert "Ran 12 tests: passed: 5, failed: 4, skipped: 3" in parsed.stdout, parsed.stdout
    assert re.findall(r"=+ \[(\w+)\] (\S+) =+", parsed.stdout) == [
        *(("FAILED", "flush"), ("PASSED", "hcall"), ("FAILED", "b")),
    ]
    # Without a test that broke, its exit status is 0.
    file.write_text(ktap.render(make_record(make_test("a"), make_test("b", "SKIP")), CONTEXT))
    assert subprocess.run([sys.executable, kunit, "parse", file], check=False).returncode == 0


def test_ktap_has_a_plan_for_each_subject() -> None:
    lines = ktap.render(hostile(), CONTEXT).splitlines()
    assert lines[:2] == ["KTAP version 1", "1..3"]
    results = [line for line in lines if re.match(r"    (not )?ok \d", line)]
    assert len(results) == 12
    assert "    ok 6 test_x.X.test_cancel # SKIP no libpmem" in results
    assert not any("System halted" in line or "partitions" in line for line in lines)


# --- LAVA, SQUAD


def test_lava_signals_are_one_line_of_words() -> None:
    lines = lava.render(hostile(), CONTEXT).splitlines()
    signal = re.compile(r"<LAVA_SIGNAL_\w+( [\w=.\-/%]+)+>")
    assert all(signal.fullmatch(line) for line in lines)
    assert "<LAVA_SIGNAL_TESTCASE TEST_CASE_ID=test_x.X.test_warn RESULT=fail>" in lines
    assert "<LAVA_SIGNAL_TESTCASE TEST_CASE_ID=test_x.X.test_cancel RESULT=skip>" in lines
    assert (
        "<LAVA_SIGNAL_TESTCASE TEST_CASE_ID=test_x.X.test_pass.flush_rate RESULT=pass "
        "MEASUREMENT=1234.5 UNITS=flushes/s>"
    ) in lines
    sets = [line.split()[1:] for line in lines if "TESTSET" in line]
    assert sets[::2] == [["START", "b>"], ["START", "flush>"], ["START", "hcall>"]]


def test_squad_has_a_submission_for_each_environment() -> None:
    record = hostile()
    guest, bare = squad.submissions(record)
    assert (guest.build, guest.environment) == (
        "6.12.117-paprscm",
        "qemu-10.0.13-tcg-power9-radix-64k",
    )
    assert (bare.build, bare.environment) == (guest.build, "qemu-10.0.13-without-kernel")
    assert guest.metadata["job_id"] != bare.metadata["job_id"]
    assert guest.tests["flush/test_x.X.test_warn"] == "fail"
    assert guest.tests["flush/test_x.X.test_remark"] == "pass"
    assert guest.tests["flush/test_x.X.test_interrupted"] == "unknown"
    assert guest.metrics["flush/test_x.X.test_pass/guest_start mark=ready"] == {
        "value": [0.5, 0.7],
        "unit": "s",
    }
    names = [*guest.tests, *guest.metrics]
    assert max(map(len, names)) == squad.NAME_LIMIT
    assert len(guest.tests) + len(bare.tests) == len(record.tests)
    assert len(json.loads(squad.render(record, CONTEXT))) == 2


# --- KCIDB


def report(record: Record, context: Context = CONTEXT) -> dict[str, Any]:
    """A report of which validation has found no fault."""
    return dict(json.loads(kcidb.dump(kcidb.report(record, context))))


def test_kcidb_has_the_statuses_of_kernelci() -> None:
    data = report(hostile())
    tests = {test["path"]: test for test in data["tests"]}
    prefix = "paprscm.flush.test_x.X."
    statuses = {
        path.removeprefix(prefix): test["status"]
        for path, test in tests.items()
        if test["status"] != "DONE"
    }
    assert {name: status for name, status in statuses.items() if "long" not in name} == {
        "test_pass": "PASS",
        "test_warn": "FAIL",
        "test_remark": "PASS",
        "test_fail": "FAIL",
        "test_error": "ERROR",
        "test_cancel": "SKIP",
        "test_skip": "SKIP",
        "test_interrupted": "MISS",
        "test_hostile": "FAIL",
        "paprscm.a-b.c.X-y.t-SKIP.v-1": "SKIP",
    }
    assert tests[f"{prefix}test_cancel"]["comment"] == "no libpmem"
    assert tests[f"{prefix}test_fail"]["comment"] == "The contract of test_fail."
    assert "panic" in tests[f"{prefix}test_fail"]["log_excerpt"]
    assert tests[f"{prefix}test_pass.flush_rate"]["number"] == {
        "value": 1234.5,
        "unit": "flushes/s",
    }
    assert kcidb.left_out(hostile()) == 1


def test_kcidb_names_the_culprit_of_a_known_issue() -> None:
    data = report(example())
    issues = {issue["id"]: issue for issue in data["issues"]}
    code = {"code": True, "tool": False, "harness": False}
    assert issues["paprscm:linux-loses-error"]["culprit"] == code
    assert issues["paprscm:qemu-sigbus"]["culprit"]["tool"] is True
    by_issue = {incident["issue_id"]: incident for incident in data["incidents"]}
    assert by_issue["paprscm:linux-loses-error"]["present"] is True
    assert by_issue["paprscm:linux-gone"]["present"] is False
    tests = {test["id"]: test for test in data["tests"]}
    assert tests[by_issue["paprscm:linux-loses-error"]["test_id"]]["status"] == "FAIL"


def test_kcidb_ids_are_the_same_each_time_and_unique() -> None:
    data = report(hostile())
    assert report(hostile()) == data
    ids = Counter(one["id"] for kind in ("tests", "builds", "incidents") for one in data[kind])
    assert set(ids.values()) == {1}
    other = make_record(*example().tests, id="another")
    assert not {t["id"] for t in report(other)["tests"]} & {t["id"] for t in data["tests"]}
    # The same kernel is the same build in each job.
    assert report(other)["builds"] == data["builds"]


def test_kcidb_refers_to_the_build_of_another_origin() -> None:
    data = report(example(), Context(build="maestro:6745f", origin="lab_1"))
    assert {test["build_id"] for test in data["tests"]} == {"maestro:6745f"}
    assert "builds" not in data
    assert "checkouts" not in data
    assert {test["origin"] for test in data["tests"]} == {"lab_1"}


def test_kcidb_links_the_logs() -> None:
    context = Context(logs_url="https://ci/job/")
    (failed,) = (t for t in report(example(), context)["tests"] if t["path"].endswith("test_fail"))
    assert failed["log_url"] == "https://ci/job/test-results/4/debug.log"
    (file,) = failed["output_files"]
    assert file == {
        "name": "guest-console.log",
        "url": "https://ci/job/test-results/4/data/guest/console.log",
    }


def test_kcidb_does_not_accept_what_the_library_lets_through() -> None:
    data = kcidb.report(example(), CONTEXT)
    data["tests"][0]["duration"] = float("nan")
    Version.validate(data)
    with pytest.raises(ValueError, match="not JSON compliant"):
        kcidb.dump(data)


@pytest.mark.parametrize(
    "wrong", [{"origin": "My CI"}, {"build": "6745f"}, {"logs_url": "ftp://x/"}]
)
def test_wrong_settings_of_reports_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError):
        Context(**wrong)


# --- Markdown


def test_markdown_shows_hostile_text_as_text() -> None:
    text = summary.render(hostile(), CONTEXT)
    blocks = MarkdownIt("commonmark").enable("table").parse(text)
    headings = [b.content for a, b in itertools.pairwise(blocks) if a.type == "heading_open"]
    assert headings[0] == (
        "paprscm: 2 FAIL, 1 ERROR, 1 INTERRUPTED, 2 WARN, 3 PASS, 2 CANCEL, 1 SKIP"
    )
    assert len(headings) == 1 + 4 + 1
    assert not any(block.type == "html_block" for block in blocks)
    fences = [block.content for block in blocks if block.type == "fence"]
    assert any("panic ]]> </system-out> ```" in fence for fence in fences)
    assert any("<LAVA_SIGNAL" in fence and "<script>" in fence for fence in fences)
    tables = [block for block in blocks if block.type == "table_open"]
    assert len(tables) == 2


def test_markdown_stays_below_the_limit_of_github() -> None:
    tests = [make_test(f"t{n}", "FAIL", id=str(n), reason="x" * 10_000) for n in range(300)]
    assert len(summary.render(make_record(*tests), Context()).encode()) < 1 << 18


# --- texts


def test_plain_text() -> None:
    assert plain("a\x1b[1;31mb\x1b]8;;http://x\x07c\x1b(Bd\r\ne\tf") == "abcd\ne\tf"
    assert plain("\x00\x7f\x9b\u202e\ufffe\udc80\u2028") == "\N{REPLACEMENT CHARACTER}" * 7
    assert plain("é 漢 😀") == "é 漢 😀"


def test_the_last_lines_of_a_large_log(tmp_path: Path) -> None:
    file = tmp_path / "console.log"
    file.write_bytes(b"x" * 10_000_000 + b"\n\n" + b"y" * 5000 + b"\xff\n" * 3 + b"last\n")
    *_, long, one, two, last = last_lines(file)
    assert (one, two, last) == ("\N{REPLACEMENT CHARACTER}",) * 2 + ("last",)
    assert len(long) == 400
    assert last_lines(tmp_path / "absent") == []
    file.write_bytes(b"")
    assert last_lines(file) == []


def test_the_console_of_a_test_that_broke_is_read(tmp_path: Path) -> None:
    console = tmp_path / "test-results/4/data/guest/console.log"
    console.parent.mkdir(parents=True)
    console.write_text("first\nlast\n")
    context = read_context(example(), tmp_path, settings.Settings(cache_dir=tmp_path))
    assert context.excerpts == {FAILED: "first\nlast"}


def test_unique_names() -> None:
    assert unique("a" * 256, 256) == "a" * 256
    one, two = unique("a" * 257, 256), unique("a" * 258, 256)
    assert len(one) == len(two) == 256
    assert one != two


def test_parts_of_a_name() -> None:
    test = make_test("a")
    assert labels.parts(test) == ("flush", "test_x", "X", "a")
    assert labels.parts(replace(test, name="bin/true")) == ("bin", "true")
    assert labels.parts(replace(test, name="f/x.py:X.a;v-1")) == ("f", "x", "X", "a", "v-1")
    assert labels.title(None) == "unknown environment"
    assert "kernel" not in labels.describe(BARE)


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """As is /dev/null, which every other program needs."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    publish(b"one", pipe)
    assert os.read(reader, 10) == b"one"
    os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_file_is_published_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    publish(b"one", file)
    monkeypatch.setattr(Path, "rename", lambda *_words: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        publish(b"two", file)
    assert file.read_text() == "one"
    assert list(tmp_path.iterdir()) == [file]


def test_a_known_issue_counts_once_a_test() -> None:
    twice = make_test("a", "WARN", known_issues=(finding("linux-x"), finding("linux-x")))
    assert "| linux-x | 1 |" in summary.render(make_record(twice), Context())
