# SPDX-License-Identifier: GPL-2.0-or-later
"""Linters and types are tests like any other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
    ],
    ids=" ".join,
)
def test_linter(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


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


def imported(file: Path) -> set[str]:
    """The modules of ours that a file imports, by name; what is only for types does not count."""
    found = set()
    tree = ast.parse(file.read_text())
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "paprscm":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paprscm."):
            found.add((node.module or "").split(".")[1])
    return found


def test_modules_import_only_from_below() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    order = re.findall(r"\w+", text.rpartition("looks):")[2])
    modules = {file.stem: file for file in (ROOT / "paprscm").glob("*.py") if file.stem[0] != "_"}
    assert set(order) == {*modules, "plugins"}, "the list in CONTRIBUTING.md is not complete"
    wrong = {
        f"{name} imports {other}"
        for place, name in enumerate(order)
        for other in (imported(modules[name]) if name in modules else ())
        if order.index(other) >= place
    }
    assert wrong == set()
