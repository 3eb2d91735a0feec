# SPDX-License-Identifier: GPL-2.0-or-later
"""`paprscm reproduce`: verdicts of scripts, and the reproductions of known issues themselves."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from paprscm.commands import reproduce
from paprscm.commands.cli import main
from paprscm.commands.reproduce import (
    Outcome,
    Reproducer,
    Reproduction,
    attempt,
    judge_output,
    remark,
)
from paprscm.known_issues import FOLDER, KnownIssue, names, read_issue

SOME = read_issue("qemu-unbind-mem-aborts")


def test_a_status_counts_only_with_both_lines() -> None:
    lines = ["expected: a", "x", "found: b"]
    assert judge_output(0, lines) == (Outcome.GONE, "a", "b")
    assert judge_output(1, lines) == (Outcome.SHOWN, "a", "b")
    assert judge_output(2, lines) == (Outcome.UNKNOWN, "a", "b")
    assert judge_output(1, lines[:2]) == (
        Outcome.UNKNOWN,
        "a",
        "exit status 1, but no line 'found:'",
    )
    text = "exit status 0, but no line 'expected:' and 'found:'"
    assert judge_output(0, []) == (Outcome.UNKNOWN, "", text)
    assert judge_output(127, ["sh: qemu: not found"])[2] == "exit status 127; sh: qemu: not found"
    assert judge_output(-9, [])[::2] == (Outcome.UNKNOWN, "killed by SIGKILL; no output")


def script(folder: Path, text: str) -> KnownIssue:
    """An issue whose reproduction is a shell script on the host."""
    (folder / "qemu-x").mkdir(exist_ok=True)
    (folder / "qemu-x/host.sh").write_text(text)
    shutil.copy(FOLDER / "lib.sh", folder)
    return dataclasses.replace(SOME, name="qemu-x", folder=folder / "qemu-x")


def run(folder: Path, text: str) -> tuple[Reproduction, list[str]]:
    lines: list[str] = []
    known = script(folder, f'. "$(dirname "$0")/../lib.sh"\nexpected right\n{text}\n')
    return attempt(Reproducer({}, echo=lines.append), known), lines


def test_the_functions_of_the_scripts(tmp_path: Path) -> None:
    for word, outcome in (("gone", 0), ("shown", 1), ("unknown", 2)):
        result, lines = run(tmp_path, f"echo text\n{word} a  b")
        assert (result.outcome, result.expected, result.found) == (outcome, "right", "a b")
        assert lines == ["expected: right", "text", "found: a b"]
        assert result.versions["QEMU"][0].isdigit()
    result, _ = run(tmp_path, "need sh surely-not-there\ngone x")
    assert (result.outcome, result.found) == (2, "surely-not-there is not installed")


def test_a_script_that_fails_cannot_tell(tmp_path: Path) -> None:
    for text in ("exit 1", "exit 0", "if", "set -e\nfalse\ngone x", "kill -9 $$"):
        assert run(tmp_path, text)[0].outcome is Outcome.UNKNOWN, text


def test_a_script_runs_in_an_empty_folder_that_is_removed(tmp_path: Path) -> None:
    result, lines = run(tmp_path, 'pwd\nls\ntouch x\n"$qemu" --version | head -n 1\ngone x')
    folder, version = Path(lines[1]), lines[2]
    assert result.outcome is Outcome.GONE
    assert result.versions["QEMU"] in version
    assert folder != Path.cwd()
    assert not folder.exists()


def test_a_script_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "LIMIT_S", 1.0)
    result, _ = run(tmp_path, "tail -f /dev/null")
    assert result.outcome is Outcome.UNKNOWN
    assert "took more than 1 s" in result.found


def test_the_outcome_is_compared_with_the_file() -> None:
    known = read_issue("qemu-decr-not-migrated")
    table = {
        (Outcome.SHOWN, "7.2.22"): "",
        (Outcome.SHOWN, "7.1.0"): "update 'Since'",
        (Outcome.SHOWN, "8.2.0"): "listed as fixed in this version: a regression",
        (Outcome.GONE, "8.2.0"): "",
        (Outcome.GONE, "7.2.22"): "update 'Fixed in'",
        (Outcome.UNKNOWN, "8.2.0"): "",
    }
    for (outcome, version), text in table.items():
        result = Reproduction(outcome, "", "", {"QEMU": version}, 0.0)
        assert bool(remark(known, result)) == bool(text)
        assert text in remark(known, result)
    # A test that could not run has no version.
    assert remark(known, Reproduction(Outcome.UNKNOWN, "", "", {}, 0.0)) == ""


def test_an_issue_without_any_reproduction(capsys: pytest.CaptureFixture[str]) -> None:
    known = dataclasses.replace(SOME, shown_by="no test", folder=Path("nowhere"))
    assert reproduce.reproduce_one({}, known) == 2
    assert "could not tell: qemu-unbind-mem-aborts has no" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "no known issue is named"),
        (["qemu-y"], "known issue"),
        (["qemu-unbind-mem-abort"], "hint: qemu-unbind-mem-aborts?"),
        (["--qemu", "/nowhere/qemu", SOME.name], "could not tell"),
    ],
)
def test_bad_input(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *words]) == 2
    captured = capsys.readouterr()
    assert text in captured.out + captured.err


# They wait for something that hangs, load a machine repeatedly, or compare durations.
SLOW = {
    "avocado-delays-messages",
    "avocado-waits-for-killed-test",
    "qemu-decr-not-migrated",
    "qemu-flush-error-after-save-lost",
    "qemu-flush-state-by-order",
    "qemu-flush-state-unchecked",
    "qemu-flushes-starve-disks",
    "qemu-maxmem-makes-slow-start",
    "qemu-nvdimm-placement-not-migrated",
    "qemu-quiesced-not-migrated",
    "qemu-reset-waits-for-flush",
    "qemu-tcg-migration-loses-stores",
    "qemu-thread-pool-waits-for-hung-request",
}
HOST_SCRIPTS = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in names()
    if (FOLDER / name / "host.sh").is_file()
]


@pytest.mark.parametrize("name", HOST_SCRIPTS)
def test_a_reproduction_agrees_with_its_file(name: str) -> None:
    """It shows the issue in a version that has it, and only there."""
    known = read_issue(name)
    result = attempt(Reproducer({}, echo=print), known)
    if result.outcome is Outcome.UNKNOWN:
        pytest.skip(result.found)
    assert remark(known, result) == ""


def test_a_reproduction_needs_nothing_of_the_suite(tmp_path: Path) -> None:
    """A copy of its files runs with a plain shell, in any folder."""
    for file in SOME.attachments:
        target = tmp_path / file.relative_to(FOLDER)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    work = tmp_path / "work"
    work.mkdir()
    ended = subprocess.run(
        ["sh", tmp_path / SOME.name / "host.sh"],
        cwd=work,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert judge_output(ended.returncode, ended.stdout.splitlines())[0] is Outcome.SHOWN


@pytest.mark.guest
def test_a_reproduction_in_a_guest(capsys: pytest.CaptureFixture[str]) -> None:
    """The host's kernel is not asked: the guest's region and its compiler are used."""
    assert main(["reproduce", "linux-devdax-maps-another-offset"]) in (0, 1)
    output = capsys.readouterr().out
    assert "found: mmap at offset 0x10000" in output
    assert "\nLinux " in output


@pytest.mark.guest
def test_a_reproduction_by_a_test_of_the_suite() -> None:
    known = read_issue("qemu-nvdimm-healthy-while-flushes-fail")
    known = dataclasses.replace(known, folder=Path("nowhere"))
    result = attempt(Reproducer({}, echo=print), known)
    assert result.outcome is not Outcome.UNKNOWN, result.found
    assert remark(known, result) == ""
