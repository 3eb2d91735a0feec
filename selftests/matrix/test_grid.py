# SPDX-License-Identifier: GPL-2.0-or-later
"""The grid of several hosts' cells, and damaged folders."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from records import finding, make_record, make_test
from rich.console import Console

from paprscm.errors import ConfigError
from paprscm.matrix import grid
from paprscm.matrix.outcome import CELLS, DONE, Outcome, mark_done, read_finished
from paprscm.matrix.plan import Exclusion
from paprscm.results.record import FILE, Test, encode

EVIL = "</title><script>alert(1)</script>\x1b[31m\u202e"


def make_cell(output: Path, cell: str, *tests: Test, reason: str = "") -> Path:
    """The folder of a cell that has ended."""
    folder = output / CELLS / cell
    job = "" if reason else "job-1"
    (folder / "job-1").mkdir(parents=True)
    (folder / "job-1" / FILE).write_bytes(encode(make_record(*tests)))
    values = {"kernel": cell.partition("-")[0]}
    mark_done(
        folder,
        Outcome(cell=cell, values=values, settings={}, job=job, reason=reason, duration_s=90.0),
    )
    return output


def text_of(output: list[Path], *, every: bool = False) -> str:
    console = Console(file=io.StringIO(), width=100)
    for table in grid.tables(read_finished(output), every=every):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_cells_of_two_hosts(tmp_path: Path) -> None:
    one = make_cell(tmp_path / "one", "6.1-64k", make_test("a"), make_test("b", "FAIL"))
    make_cell(one, "7.2-64k", make_test("a"), make_test("b"), make_test("c", "CANCEL"))
    two = make_cell(tmp_path / "two", "6.12-64k", reason="no such package")
    text = text_of([one, two])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[1] == "1 6.1-64k 1 FAIL, 1 PASS 1.5 min"
    assert lines[2] == "2 6.12-64k not built: no such package 1.5 min"
    assert lines[3] == "3 7.2-64k 2 PASS, 1 CANCEL 1.5 min"
    # A test that is alike in all its cells is not shown.
    assert lines[-1] == "flush/test_x.py:X.b F ·"
    assert "X.c" not in text
    assert "X.a" in text_of([one, two], every=True)
    finished = read_finished([one, two])
    assert [cell.is_fine for cell in finished] == [False, False, True]
    assert grid.durations(finished)["7.2-64k"] == 90.0


def test_the_page_shows_each_status_with_its_reason(tmp_path: Path) -> None:
    test = make_test("a", "FAIL", reason=f"broken {EVIL}")
    warned = make_test("a", "WARN", known_issues=(finding("linux-x"),))
    output = make_cell(tmp_path, "6.1-64k", test)
    make_cell(output, "7.2-64k", warned)
    make_cell(output, "9.9-64k", reason=EVIL)
    html = grid.page(read_finished([output]), [Exclusion({"cpu": ("power11",)}, EVIL)])
    assert "<script" not in html
    assert "\x1b" not in html.replace("&#", "")
    assert 'class="FAIL" title="6.1-64k: FAIL, broken' in html
    assert 'title="7.2-64k: WARN, linux-x"' in html
    assert "cpu: power11" in html
    # Nothing is loaded from elsewhere.
    assert "default-src 'none'" in html
    assert "http" not in html.replace("http-equiv", "")


def refuse(output: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_finished([output])


def test_damaged_folders(tmp_path: Path) -> None:
    refuse(tmp_path, "holds no cell that has ended")
    output = make_cell(tmp_path, "6.1-64k", make_test("a"))
    mark = output / CELLS / "6.1-64k" / DONE
    whole = json.loads(mark.read_text())
    for text, message in (
        ("{", "cannot be read"),
        (json.dumps({**whole, "other": 1}), "cannot be read: .*other"),
        (json.dumps({key: whole[key] for key in whole if key != "job"}), "missing .*job"),
    ):
        mark.write_text(text)
        refuse(output, message)
    mark.write_text(json.dumps({**whole, "format": "paprscm-cell/9"}))
    refuse(output, "paprscm-cell/9")
    mark.write_text(json.dumps({**whole, "job": "absent"}))
    refuse(output, "absent does not exist")
    mark.write_text(json.dumps({**whole, "job": "../../.."}))
    refuse(output, "not the name of a folder")


def test_a_cell_that_is_in_two_folders(tmp_path: Path) -> None:
    one, two = (make_cell(tmp_path / name, "6.1-64k", make_test("a")) for name in ("a", "b"))
    with pytest.raises(ConfigError, match=r"the cell 6\.1-64k is in"):
        read_finished([one, two])
