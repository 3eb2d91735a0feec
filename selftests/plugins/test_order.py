# SPDX-License-Identifier: GPL-2.0-or-later
"""Longest tests first, and the file with their durations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paprscm.paths import ROOT
from paprscm.plugins import order
from paprscm.plugins.order import FILE, read_durations, write_durations
from paprscm.results.record import read_record

TESTS = """
from paprscm.testcase import QemuTest


class Three(QemuTest):
    def test_a(self):
        self.measure("name", "a")

    def test_b(self):
        self.cancel("not complete")

    def test_c(self):
        self.measure("name", "c")
"""


def run(folder: Path, *words: str) -> tuple[str, str]:
    """Run the tests with durations in `folder`; return their order, and the job's log."""
    (folder / "three.py").write_text(TESTS)
    results = folder / "results"
    argv = [
        *(str(Path(sys.executable).with_name("avocado")), "run", "--job-results-dir", str(results)),
        *("-p", f"cache_dir={folder}", *words, str(folder / "three.py")),
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert "PASS 2" in done.stdout
    assert "CANCEL 1" in done.stdout
    log = (results / "latest" / "job.log").read_text()
    tests = read_record(results / "latest").tests
    # Numbers follow the order of the starts; two that start together are reported in any order.
    assert [test.id[0] for test in tests] == ["1", "2", "3"]
    starts = [test.times.began_s for test in tests if test.times]
    assert starts == sorted(starts) or "--max-parallel-tasks=2" in words
    return "".join(test.name[-1] for test in tests), log


def test_tests_start_by_their_durations(tmp_path: Path) -> None:
    key = f"{tmp_path.name}/three.py:Three.test_"
    (tmp_path / FILE).write_text(json.dumps({f"{key}a": 3, f"{key}b": 5, "other/x.py:X.test": 7}))
    # An unknown one may be long.
    first, log = run(tmp_path, "--max-parallel-tasks=2")
    assert first == "cba"
    assert "longest first; the durations of 2 of 3 are known" in log
    durations = read_durations(tmp_path / FILE)
    # A cancelled test has not done all its work.
    assert durations.pop(f"{key}b") == 5
    assert durations.pop("other/x.py:X.test") == 7
    assert set(durations) == {f"{key}a", f"{key}c"}
    assert durations[f"{key}a"] != 3
    (tmp_path / FILE).write_text(json.dumps({f"{key}c": 9}))
    first, log = run(tmp_path, "--max-parallel-tasks=1")
    assert first == "abc"
    assert "longest first" not in log
    _, log = run(tmp_path, "--max-parallel-tasks=2", "--shuffle")
    assert "longest first" not in log


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"a": "long"}', '{"a": null}', "\\xff"])
def test_a_damaged_file_is_replaced(tmp_path: Path, damage: str) -> None:
    file = tmp_path / FILE
    file.write_bytes(damage.encode().decode("unicode_escape").encode("latin1"))
    assert read_durations(file) == {}
    write_durations(file, {"b": 2.5})
    assert read_durations(file) == {"b": 2.5}
    assert list(tmp_path.iterdir()) == [file]


def test_only_the_latest_durations_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "_KEPT", 2)
    file = tmp_path / FILE
    write_durations(file, {"a": 1, "b": 2})
    write_durations(file, {"a": 3, "c": 4})
    assert read_durations(file) == {"a": 3, "c": 4}


def test_a_file_that_cannot_be_written_is_ignored(tmp_path: Path) -> None:
    write_durations(tmp_path / "missing" / FILE, {"a": 1})
    (tmp_path / FILE).mkdir()
    write_durations(tmp_path / FILE, {"a": 1})
    assert read_durations(tmp_path / FILE) == {}
    assert list(tmp_path.iterdir()) == [tmp_path / FILE]
