# SPDX-License-Identifier: GPL-2.0-or-later
"""Linters and the type checker, run as tests."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from paprscm.paths import ROOT


def _files(*patterns: str) -> list[str]:
    """The C sources."""
    folders = ("guest_tools", "host_tools", "known_issues", "known_issues/*")
    return sorted(
        str(file)
        for folder in folders
        for pattern in patterns
        for file in ROOT.glob(f"{folder}/{pattern}")
    )


def _scripts() -> list[str]:
    """Shell scripts of the checkout: by their first line, or by the suffix .sh."""
    folders = (".", ".ci", "docs", "examples", "guest_tools", "images", "selftests", "tools")
    issues = ("known_issues", "known_issues/*")
    files = [
        file
        for folder in (*folders, *issues)
        for file in ROOT.glob(f"{folder}/*")
        if file.is_file()
    ]
    return sorted(
        str(file)
        for file in files
        if file.suffix == ".sh" or re.match(rb"#!.*\b(ba)?sh\b", file.read_bytes()[:80])
    )


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["lint-imports"],
        ["codespell"],
        ["clang-format", "--dry-run", "--Werror", *_files("*.c", "*.h")],
        # The reproductions name functions in variables, call some with and without arguments, and
        # end with `… || unknown`, which does not return.
        [
            *("shellcheck", "--severity=style", "--external-sources", "--source-path=SCRIPTDIR"),
            *("--exclude=SC2015,SC2119,SC2329", *_scripts()),
        ],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_linter(command: list[str]) -> None:
    program = Path(sys.executable).with_name(command[0])
    if not program.exists() and command[0] == "shellcheck":
        pytest.skip("PyPI has no shellcheck for this machine")
    done = subprocess.run(
        [program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_suites_tests_fail_in_one_way() -> None:
    """Through check(), expect() or an exception of paprscm.errors; ruff forbids `assert`."""
    other = re.compile(r"self\.(assert\w+|fail|cancel|error|skipTest)\(")
    lines = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in sorted((ROOT / "tests").rglob("*.py"))
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if other.search(line)
    ]
    assert lines == []


def test_every_source_file_names_its_licence() -> None:
    kinds = {".py", ".c", ".h", ".S"}
    folders = ("paprscm", "tests", "selftests", "guest_tools", "host_tools")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*")]
    without = [
        file.relative_to(ROOT)
        for file in files
        if file.suffix in kinds
        and "SPDX-License-Identifier: GPL-2.0-or-later" not in file.read_text()
    ]
    assert without == []


def test_no_module_grows_past_two_subjects() -> None:
    long = {
        file.name: lines
        for file in (ROOT / "paprscm").rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > 450
    }
    assert long == {}


def test_pytest_enters_every_folder(pytestconfig: pytest.Config) -> None:
    """Its default skips folders with names such as "build" without a word."""
    skipped = pytestconfig.getini("norecursedirs")
    for file in (ROOT / "selftests").rglob("test_*.py"):
        for folder in file.relative_to(ROOT).parts[:-1]:
            assert not any(fnmatch(folder, pattern) for pattern in skipped), file
